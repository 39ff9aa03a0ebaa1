"""A run that was broken off goes on from its folder to the very same circuit; folders of other runs and damaged files are refused."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import tl_nodeprune as tlnp
from tl_nodeprune.nodes.attachment import temporary_hooks
from tl_nodeprune.search import checkpoint as checkpoints

Toy = tuple[Any, tlnp.PromptPairs]
SEARCH: dict[str, Any] = {"max_kl": 0.3, "steps": 8, "step_prompts": 5, "exact_tests": 2, "progress": False}


@pytest.fixture(autouse=True)
def one_thread_and_saved_at_every_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(checkpoints, "EVERY", 0.0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pruned(toy: Toy, ablation: str = "interchange", breaks_at: int | None = None, **search: Any) -> tuple[tlnp.PruneResult | None, int]:
    """What a search found, None where it was broken off by Ctrl-C in a forward with gradient; and how many of these there were."""
    masks, seen = toy[0].add_node_masks(("head", "mlp"), ablation=ablation), 0

    def interrupt(activation: Tensor, hook: Any) -> None:
        nonlocal seen
        seen += torch.is_grad_enabled()
        if breaks_at is not None and seen == breaks_at:
            raise KeyboardInterrupt

    try:
        with temporary_hooks(toy[0], [("blocks.0.hook_resid_pre", interrupt)]):
            return masks.prune(toy[1], **{**SEARCH, **search}), seen
    except KeyboardInterrupt:
        assert masks.attached and masks.to_circuit() == tlnp.Circuit.full(masks.space), "the masks are as before"
        return None, seen
    finally:
        masks.remove()


@pytest.mark.parametrize("ablation", ["interchange", "optimal"])
def test_a_run_broken_off_and_started_again_ends_in_the_same_circuit(toy: Toy, tmp_path: Path, ablation: str) -> None:
    whole, forwards = pruned(toy, ablation)
    broken, done = pruned(toy, ablation, breaks_at=12, checkpoint=tmp_path)
    assert broken is None and done == 12 and [path.name for path in tmp_path.iterdir()] == ["search.safetensors"]
    again, left = pruned(toy, ablation, checkpoint=str(tmp_path))
    assert whole is not None and again is not None and left <= forwards - 10, "the start and some steps are not done again"
    assert again.circuit == whole.circuit and again.scores == whole.scores and again.ranking == whole.ranking
    assert (again.kl, again.search_kl, again.history) == (whole.kl, whole.search_kl, whole.history)
    assert again.frontier.equals(whole.frontier) and again.circuit.ablation == whole.circuit.ablation


def test_a_run_that_ended_is_not_trained_again(toy: Toy, tmp_path: Path) -> None:
    first, forwards = pruned(toy, checkpoint=tmp_path / "new" / "folder")
    other, left = pruned(toy, checkpoint=tmp_path / "new" / "folder")
    assert first is not None and other is not None and left <= forwards - 8
    assert other.ranking == first.ranking and other.circuit == first.circuit


@pytest.mark.parametrize(("change", "name"), [
    ({"seed": 1}, "seed"), ({"steps": 9}, "steps"), ({"step_prompts": 6}, "step_prompts"), ({"max_kl": 3.0}, "budget"),
    ({"max_kl": None, "max_nodes": {"head": 3}}, "limits")])
def test_a_checkpoint_of_another_run_says_what_differs(toy: Toy, tmp_path: Path, change: dict[str, Any], name: str) -> None:
    pruned(toy, breaks_at=8, checkpoint=tmp_path)
    before = (tmp_path / "search.safetensors").read_bytes()
    with pytest.raises(ValueError, match=f"is of another run: ([a-z_]+, )*{name}(, [a-z_]+)* differ. Give another folder, or remove it"):
        pruned(toy, checkpoint=tmp_path, **change)
    assert (tmp_path / "search.safetensors").read_bytes() == before


def test_a_checkpoint_of_other_prompts_nodes_or_ablation(toy: Toy, tmp_path: Path, others: tlnp.PromptPairs) -> None:
    pruned(toy, breaks_at=8, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="is of another run: prompts differ"):
        pruned((toy[0], toy[1][:23]), checkpoint=tmp_path)
    with pytest.raises(ValueError, match="is of another run: held_out differ"):
        pruned(toy, checkpoint=tmp_path, held_out=others)
    with pytest.raises(ValueError, match="is of another run: ablation differ"):
        pruned(toy, "zero", checkpoint=tmp_path)
    masks = toy[0].add_node_masks(("head",))
    with pytest.raises(ValueError, match="is of another run: nodes differ"):
        masks.prune(toy[1], **SEARCH, checkpoint=tmp_path)
    masks.remove()


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"{}" + data])
def test_a_damaged_file_is_named(toy: Toy, tmp_path: Path, damage: Any) -> None:
    pruned(toy, breaks_at=8, checkpoint=tmp_path)
    path = tmp_path / "search.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="search.safetensors is damaged or not a checkpoint of this library; remove it to start again"):
        pruned(toy, checkpoint=tmp_path)


def test_a_circuits_file_is_no_checkpoint(toy: Toy, tmp_path: Path) -> None:
    tlnp.Circuit.full(tlnp.nodes.probe.find_nodes(toy[0])).save(tmp_path / "search.safetensors")
    with pytest.raises(ValueError, match="is damaged or not a checkpoint of this library"):
        pruned(toy, checkpoint=tmp_path)


def test_a_folder_that_cannot_be_written_is_an_error_before_the_search(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        masks, forwards = toy[0].add_node_masks(("head", "mlp")), list[int]()
        handle = toy[0].hook_dict["blocks.0.hook_resid_pre"].register_forward_hook(
            lambda _, given, out, seen=forwards: seen.append(torch.is_grad_enabled()) if torch.is_grad_enabled() else None)
        try:
            with pytest.raises(OSError):
                masks.prune(toy[1], **SEARCH, checkpoint=folder)
        finally:
            handle.remove()
            masks.remove()
        assert not forwards, "nothing was trained"


def test_a_folder_is_a_name(toy: Toy) -> None:
    with pytest.raises(TypeError, match="checkpoint=3; it must be a string or a Path"):
        pruned(toy, checkpoint=3)


def test_a_file_that_lacks_a_part_is_damaged(toy: Toy, tmp_path: Path) -> None:
    pruned(toy, checkpoint=tmp_path)
    path = tmp_path / checkpoints.NAME
    with safe_open(str(path), framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys() if name != "scores"}
    save_file(tensors, str(path), header)
    with pytest.raises(ValueError, match="is damaged: it lacks 'scores'"):
        pruned(toy, checkpoint=tmp_path)


def test_what_a_killed_run_left_is_removed_and_a_users_files_stay(toy: Toy, tmp_path: Path) -> None:
    left = tmp_path / f".tl_nodeprune-{socket.gethostname()}-999999999-ab.part"  # no process has that number
    for path in (left, tmp_path / "search.safetensors.part", tmp_path / "notes.part"):
        path.write_text("half")
    pruned(toy, breaks_at=8, checkpoint=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.part", "search.safetensors", "search.safetensors.part"]


def test_a_link_in_the_place_of_the_state_is_refused(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / checkpoints.NAME).symlink_to("elsewhere")
    with pytest.raises(FileExistsError, match="symbolic link"):
        pruned(toy, checkpoint=tmp_path)
