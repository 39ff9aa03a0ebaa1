"""`sweep`: the same runs whatever executes them, its tables by hand-made circuits, what it refuses, what it leaves behind."""

from __future__ import annotations

import math
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from typing import Any

import pandas as pd
import pytest
import torch

import tl_nodeprune as tlnp
from tl_nodeprune.circuit.evaluation import Metrics
from tl_nodeprune.nodes.probe import find_nodes
from tl_nodeprune.nodes.space import GateKey, NodeSpace
from tl_nodeprune.search.sweep import SweepRun

Toy = tuple[Any, tlnp.PromptPairs]
SHAPES = {GateKey("attn", 0): (), GateKey("head", 0): (2,), GateKey("attn_neuron", 0): (2, 2), GateKey("mlp", 0): (),
          GateKey("mlp_neuron", 0): (3,)}
SPACE = NodeSpace(SHAPES, SHAPES, d_model=4, n_layers=1, kv_heads=2, gated_mlp=False)


def loader() -> Any:
    return tlnp.toy.load("ioi", n=1)[0]


@pytest.fixture(scope="module")
def few() -> tlnp.PromptPairs:
    return tlnp.toy.load("ioi", n=8)[1]


@pytest.fixture(scope="module")
def found(few: tlnp.PromptPairs) -> tlnp.Sweep:
    """Two budgets, given in the wrong order, and two seeds, in this process."""
    return tlnp.sweep(loader(), few, max_kl=(1.0, 0.1), seeds=(0, 1), granularities=("head", "mlp"), progress=False)


def test_runs_are_by_seed_from_the_smallest_budget_on(found: tlnp.Sweep, few: tlnp.PromptPairs) -> None:
    assert [(run.seed, run.max_kl) for run in found.runs] == [(0, 0.1), (0, 1.0), (1, 0.1), (1, 1.0)]
    for run in found.runs:
        train, held_out = few.split(0.75, run.seed)
        assert run.held_out.n_prompts == len(held_out) == 2
        model = loader()
        assert run.held_out.kl == pytest.approx(tlnp.evaluate(model, run.result.circuit, held_out).kl)
        assert run.result.kl == pytest.approx(run.held_out.kl, abs=1e-5)
        assert run.result.search_kl == pytest.approx(tlnp.evaluate(model, run.result.circuit, train).kl, abs=1e-5)


def test_a_larger_budget_never_gives_a_larger_circuit(found: tlnp.Sweep) -> None:
    small, large = ([run.result.circuit.size for run in found.runs if run.max_kl == max_kl] for max_kl in (0.1, 1.0))
    assert all(b <= a for a, b in zip(small, large, strict=True)) and sum(large) < sum(small)
    assert all(run.result.converged is None and run.result.kl <= run.max_kl for run in found.runs), "two held out are too few to tell"


def test_tables(found: tlnp.Sweep) -> None:
    table, frontier = found.to_frame(), found.frontier()
    assert list(table) == ["max_kl", "seed", "converged", "nodes", "share", "held_out_kl", "search_kl", "accuracy", "faithfulness",
                           "seconds"]
    assert list(table["nodes"]) == [run.result.circuit.size for run in found.runs]
    assert list(table["share"] * 15) == pytest.approx(list(table["nodes"]))  # 12 heads and 3 MLPs
    assert list(frontier["max_kl"]) == [0.1, 1.0] and not (frontier["converged"] > 0).any() and "seed" not in frontier
    assert frontier.loc[0, "nodes"] == table.loc[[0, 2], "nodes"].mean()  # the median of two
    assert frontier.loc[1, "held_out_kl"] == pytest.approx(table.loc[[1, 3], "held_out_kl"].mean())
    assert "4 runs, seeds [0, 1]" in repr(found)


@pytest.mark.parametrize(("make", "seeds"), [
    (partial(ThreadPoolExecutor, 2), (1, 0)), (partial(ProcessPoolExecutor, 1, mp_context=multiprocessing.get_context("spawn")), (1,)),
], ids=["threads", "processes"])
def test_executors_find_the_same(toy: Toy, few: tlnp.PromptPairs, found: tlnp.Sweep, make: Callable[[], Executor],
                                 seeds: tuple[int, ...]) -> None:
    with make() as executor:
        model = toy[0] if isinstance(executor, ThreadPoolExecutor) else loader
        other = tlnp.sweep(model, few, max_kl=[0.1], seeds=seeds, granularities=iter(("mlp", "head")), executor=executor, progress=False)
    assert [run.seed for run in other.runs] == list(seeds)
    for two in other.runs:
        (one,) = [run for run in found.runs if (run.seed, run.max_kl) == (two.seed, two.max_kl)]
        assert one.result.circuit == two.result.circuit and one.result.history == two.result.history and one.held_out == two.held_out
        assert len(pickle.dumps(two)) < 100_000, "a result holds no model"


def test_steps_and_batch_size_reach_each_search(toy: Toy, few: tlnp.PromptPairs) -> None:
    """Fewer steps are fewer; the batch size is memory, not result, of the search and of what judges it."""
    circuits, rows = [], list[int]()
    for batch_size in (2, 64):
        handle = toy[0].hook_dict["blocks.0.hook_resid_pre"].register_forward_hook(
            lambda _, given, out: rows.append(len(out)) if out.shape[1] == few.clean.shape[1] else None)  # not the probe's
        try:
            (run,) = tlnp.sweep(toy[0], few, max_kl=(0.1,), seeds=(0,), granularities=("head",), steps=3, batch_size=batch_size,
                                progress=False).runs
        finally:
            handle.remove()
        assert rows and max(rows) <= batch_size
        assert len(run.result.history) == 3
        circuits.append(run.result.circuit)
    assert circuits[0] == circuits[1]


def test_the_agreement_is_each_search_s(toy: Toy, few: tlnp.PromptPairs) -> None:
    """A budget of 4 nats, of which so few pairs are given 2, lets the choice go, unless it is asked for."""
    sizes = [tlnp.sweep(toy[0], few, max_kl=(4.0,), seeds=(0,), granularities=("head", "mlp"), agreement=agreement, steps=20,
                        progress=False).runs[0].result.circuit.size for agreement in (0.0, 1.0)]
    assert sizes[0] < sizes[1]


def test_mean_ablation_is_of_all_prompts_however_long(toy: Toy, few: tlnp.PromptPairs) -> None:
    """One prompt is longer than the others: wherever it falls, each seed's circuit can be judged, and a consensus be made."""
    def padded(name: str, columns: int) -> torch.Tensor:
        tokens = getattr(few, name)
        return torch.cat([tokens, tokens[:, -1:].expand(-1, columns)], 1)

    width, longest = few.clean.shape[1], torch.arange(len(few)) == 3
    mask = (torch.arange(width + 2) < width) | longest[:, None]
    prompts = tlnp.PromptPairs(padded("clean", 2), padded("corrupted", 2), few.answers, few.wrong_answers, mask)
    found = tlnp.sweep(toy[0], prompts, max_kl=(1.0, 2.0), seeds=range(4), granularities=("mlp",), ablation="mean", steps=4, progress=False)
    searched_on = {int(prompts.split(0.75, seed)[0].reach) for seed in range(4)}
    assert searched_on == {width, width + 2}, "both happen here"
    wanted = tlnp.Ablation("mean").fit(toy[0], prompts, found.runs[0].result.circuit.space.hooks)
    assert all(run.result.circuit.ablation == wanted for run in found.runs)
    assert found.consensus(1.0).ablation.name == "mean"


def fails(few: tlnp.PromptPairs, model: Any, **options: Any) -> tlnp.Sweep:
    return tlnp.sweep(model, few, max_kl=(0.1,), seeds=(0, 1, 2), granularities=("mlp",), progress=False, **options)


@pytest.mark.parametrize("make", [lambda: None, partial(ThreadPoolExecutor, 2)], ids=["here", "threads"])
def test_the_model_is_left_as_it_was_after_an_error(toy: Toy, few: tlnp.PromptPairs, no_hooks_left: Callable[[Any], None],
                                                    make: Callable[[], Executor | None]) -> None:
    model, executor = toy[0], make()
    before = model(few.clean)
    handle = model.hook_dict["blocks.0.hook_resid_pre"].register_forward_hook(lambda _, given, out: out * math.nan)
    with pytest.raises(FloatingPointError):
        fails(few, model, executor=executor)
    handle.remove()
    no_hooks_left(model)
    assert torch.equal(model(few.clean), before) and all(p.requires_grad for p in model.parameters())
    if executor:
        executor.shutdown()


def test_refuses_a_model_with_masks_or_a_circuit(fresh_toy: Toy, few: tlnp.PromptPairs) -> None:
    model = fresh_toy[0]
    with ThreadPoolExecutor(1) as threads:
        for executor in (None, threads):
            masks = model.add_node_masks(("head",))
            with pytest.raises(RuntimeError, match="node masks are attached to this model already"):
                fails(few, model, executor=executor)
            assert masks.attached
            model.remove_node_masks()
            circuit = tlnp.Circuit.empty(masks.space)
            with circuit.applied(model, few), pytest.raises(RuntimeError, match="a circuit is attached to this model already"):
                fails(few, model, executor=executor)


def test_a_model_that_other_processes_cannot_get(toy: Toy, few: tlnp.PromptPairs) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as processes:
        for model in (toy[0], lambda: toy[0]):
            with pytest.raises(TypeError, match="ProcessPoolExecutor .* cannot be pickled .* a function without arguments"):
                fails(few, model, executor=processes)
        assert not processes._processes, "nothing was started"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("options", "error", "text"), [
    ({"max_kl": ()}, ValueError, "max_kl is empty"),
    ({"max_kl": (0.1, 0.0)}, ValueError, r"max_kl=\(0.1, 0.0\) holds 0.0; each must be a finite number above 0"),
    ({"max_kl": (-0.1,)}, ValueError, "holds -0.1"),
    ({"max_kl": (math.nan,)}, ValueError, "holds nan"),
    ({"max_kl": (math.inf,)}, ValueError, "holds inf"),
    ({"max_kl": (0.1, 0.2, 0.1)}, ValueError, r"max_kl=\(0.1, 0.2, 0.1\) holds 0.1 more than once"),
    ({"max_kl": 0.1}, TypeError, r"max_kl=0.1; it must be several numbers, such as \(0.05, 0.1\)"),
    ({"max_kl": "0.1"}, TypeError, "max_kl='0.1'"),
    ({"seeds": []}, ValueError, "seeds is empty"),
    ({"seeds": (0, 1, 0)}, ValueError, r"seeds=\(0, 1, 0\) holds 0 more than once"),
    ({"seeds": 3}, TypeError, r"seeds=3; it must be several whole numbers, such as \(0, 1, 2\)"),
    ({"seeds": (0.5,)}, TypeError, r"seeds must be several whole numbers.*holds 0.5"),
    ({"share": 1.0}, ValueError, "share=1.0 and 24"),
    ({"steps": 0}, ValueError, "steps=0; it must be a whole number, 1 or more"),
    ({"batch_size": 2.5}, TypeError, "batch_size=2.5; it must be a whole number"),
    ({"share": math.nan}, ValueError, "share=nan"),
    ({"agreement": 1.5}, ValueError, "agreement=1.5; it is a share of the prompts"),
    ({"agreement": "all"}, TypeError, "agreement='all'; it must be a number"),
    ({"ablation": "mode"}, ValueError, "unknown ablation 'mode'"),
    ({"granularities": ("heads",)}, ValueError, "unknown granularity 'heads'"),
    ({"executor": 2}, TypeError, "executor must be an Executor, got int; .*client.get_executor"),
])
def test_refuses(toy: Toy, options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        tlnp.sweep(*toy, progress=False, **options)


def test_refuses_prompts_and_models_that_are_none(toy: Toy, few: tlnp.PromptPairs) -> None:
    with pytest.raises(ValueError, match="2 different clean prompts or more; got share=0.75 and 1"):
        tlnp.sweep(toy[0], few[0])
    with pytest.raises(TypeError, match="prompts must be PromptPairs, got str"):
        tlnp.sweep(toy[0], "ioi")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="vocabulary ends at 198"):
        tlnp.sweep(toy[0], tlnp.PromptPairs(few.clean + 500, few.corrupted, few.answers, few.wrong_answers))
    for model in ("gpt2", torch.nn.Linear(1, 1), lambda: None):
        with pytest.raises(TypeError, match="model must be a HookedTransformer or TransformerBridge, got (str|Linear|NoneType)"):
            tlnp.sweep(model, few, progress=False)


def made(z: list[list[int]], neurons: list[int], ablation: tlnp.Ablation = tlnp.Ablation()) -> tlnp.Circuit:  # noqa: B008
    leaves = {GateKey("attn_neuron", 0): torch.tensor(z), GateKey("mlp_neuron", 0): torch.tensor(neurons)}
    return tlnp.Circuit(SPACE, {key: leaves.get(key, torch.ones(shape)) for key, shape in SHAPES.items()}, ablation)


def made_sweep(*circuits: tlnp.Circuit) -> tlnp.Sweep:
    metrics = Metrics(0.1, 1.0, 2.0, 1.0)
    held_out = tlnp.Evaluation(metrics, metrics, metrics, 1.0, circuits[0].ablation.name, 4)
    results = [tlnp.PruneResult(circuit, True, 0.05, 0.05, [], 1.0, 0) for circuit in circuits]
    return tlnp.Sweep(tuple(SweepRun(0.1, seed, result, held_out) for seed, result in zip((3, 5, 8), results, strict=False)))


@pytest.fixture()
def three() -> tlnp.Sweep:
    return made_sweep(made([[1, 1], [0, 0]], [1, 0, 0]), made([[1, 0], [0, 0]], [1, 1, 0]), made([[1, 0], [0, 1]], [0, 0, 0]))


def test_frequency_by_hand(three: tlnp.Sweep) -> None:
    frequency = three.frequency(0.1)
    assert list(frequency) == list(SPACE.hooks)
    expected = {"blocks.0.attn.hook_z": [[1, 1 / 3], [0, 1 / 3]], "blocks.0.hook_attn_out": 1.0,
                "blocks.0.mlp.hook_post": [2 / 3, 1 / 3, 0], "blocks.0.hook_mlp_out": 2 / 3}
    for hook, value in expected.items():
        torch.testing.assert_close(frequency[hook], torch.tensor(value))


def test_iou_by_hand(three: tlnp.Sweep) -> None:
    want = pd.DataFrame([[1, 2 / 4, 1 / 4], [2 / 4, 1, 1 / 4], [1 / 4, 1 / 4, 1]], index=[3, 5, 8], columns=[3, 5, 8])
    pd.testing.assert_frame_equal(three.iou(0.1), want, check_names=False)


@pytest.mark.parametrize(("share", "z", "neurons"), [
    (1e-6, [[1, 1], [0, 1]], [1, 1, 0]), (1 / 3, [[1, 1], [0, 1]], [1, 1, 0]), (0.5, [[1, 0], [0, 0]], [1, 0, 0]),
    (2 / 3, [[1, 0], [0, 0]], [1, 0, 0]), (1, [[1, 0], [0, 0]], [0, 0, 0]),
])
def test_consensus_by_hand(three: tlnp.Sweep, share: float, z: list[list[int]], neurons: list[int]) -> None:
    assert three.consensus(0.1, share) == made(z, neurons)
    assert three.consensus(0.1) == three.consensus(0.1, 0.5)


def test_consensus_is_consistent_where_no_child_has_the_votes() -> None:
    consensus = made_sweep(made([[1, 0], [0, 0]], [1, 0, 0]), made([[0, 1], [0, 0]], [0, 1, 0])).consensus(0.1, 1)
    assert consensus == tlnp.Circuit.empty(SPACE)  # head 0, its block and the MLP are in both, but nothing below is


def test_consensus_keeps_the_ablation() -> None:
    ablations = [tlnp.Ablation("mean", {hook: torch.full((1, *SPACE.activation(hook)), value) for hook in SPACE.hooks})
                 for value in (1.0, 3.0)]
    consensus = made_sweep(*(made([[1, 0], [0, 0]], [1, 0, 0], ablation) for ablation in ablations)).consensus(0.1)
    assert consensus.ablation.name == "mean" and consensus.ablation.constants["blocks.0.hook_mlp_out"].tolist() == [[2.0] * 4]


@pytest.mark.parametrize("ask", [tlnp.Sweep.frequency, tlnp.Sweep.iou, tlnp.Sweep.consensus])
def test_a_budget_that_was_not_swept(three: tlnp.Sweep, ask: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"max_kl=0.3 was not swept; swept were 0.1\."):
        ask(three, 0.3)


@pytest.mark.parametrize("share", [0, -0.5, 1.1, math.nan])
def test_consensus_refuses(three: tlnp.Sweep, share: float) -> None:
    with pytest.raises(ValueError, match=f"share={share}; it must be above 0 and at most 1"):
        three.consensus(0.1, share)


@pytest.mark.slow
def test_optimal_constants_go_with_the_circuit(toy: Toy, few: tlnp.PromptPairs) -> None:
    """The next budget starts from the constants that were learned for the circuit it starts from."""
    found = tlnp.sweep(toy[0], few, max_kl=(0.5, 2.0), seeds=(0,), granularities=("mlp",), ablation="optimal", progress=False)
    assert [run.result.circuit.ablation.name for run in found.runs] == ["optimal"] * 2
    assert found.runs[1].result.circuit.size <= found.runs[0].result.circuit.size
    assert set(found.consensus(2.0).ablation.constants) == set(find_nodes(toy[0]).restrict(("mlp",)).hooks)
