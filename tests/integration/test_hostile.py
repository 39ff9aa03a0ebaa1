"""Every public function that runs a model, in every state that a model, torch or the prompts may be in: the value that it has otherwise, or
an error of this library in words. Afterwards nothing is left on the model.

`pytest -m slow -s tests/integration/test_hostile.py` prints how many were tried and how they ended.
"""

from __future__ import annotations

import copy
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_nodeprune as tlnp
from tl_nodeprune.nodes.attachment import temporary_hooks
from tl_nodeprune.nodes.probe import find_nodes

HERE = str(Path(tlnp.__file__).parent)
HEADS = ("head", "mlp")
KEPT = {"head": [(0, 1), (1, 2), (2, 0), (2, 3)], "mlp": [(0,), (2,)]}
MLP = "blocks.1.hook_mlp_out"
QUIET = {"progress": False}
Prompts = tlnp.PromptPairs
Use = Callable[[Any, Prompts], Any]


def circuit_of(model: Any) -> tlnp.Circuit:
    return tlnp.Circuit.from_nodes(model, KEPT)


def trained(model: Any, prompts: Prompts) -> list[Tensor]:
    """Two steps of one's own loop."""
    masks = tlnp.add_node_masks(model, HEADS)
    try:
        optimizer = torch.optim.Adam(masks.parameters(), lr=0.5)
        for _ in range(2):
            with torch.enable_grad(), masks.paired(prompts):
                loss = -prompts.logit_diff(model(prompts.clean)[torch.arange(len(prompts)), prompts.answer_positions]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return [score.detach() for score in masks.parameters()]
    finally:
        masks.remove()


def searched(run: Callable[[tlnp.NodeMasks], Any]) -> Use:
    def use(model: Any, prompts: Prompts) -> Any:
        with (masks := tlnp.NodeMasks(find_nodes(model).restrict(HEADS))).on(model):
            return run(masks)(prompts)

    return use


def masked_logits(model: Any, prompts: Prompts) -> Tensor:
    (masks := tlnp.NodeMasks(find_nodes(model).restrict(HEADS))).set_to(circuit_of(model))
    with masks.on(model), masks.paired(prompts), torch.no_grad():
        return model(prompts.clean)[torch.arange(len(prompts)), prompts.answer_positions]  # type: ignore[no-any-return]


def applied(model: Any, prompts: Prompts) -> Tensor:
    with circuit_of(model).applied(model, prompts), torch.no_grad():
        return model(prompts.clean)[torch.arange(len(prompts)), prompts.answer_positions]  # type: ignore[no-any-return]


def with_fwd_hooks(model: Any, prompts: Prompts) -> Tensor:
    with torch.no_grad():
        logits = model.run_with_hooks(prompts.clean, fwd_hooks=circuit_of(model).fwd_hooks(model, prompts))
    return logits[torch.arange(len(prompts)), prompts.answer_positions]  # type: ignore[no-any-return]


def scores_at(model: Any) -> dict[str, Tensor]:
    return {f"blocks.{layer}.attn.hook_z": torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float32) + layer for layer in range(3)}


def ran(what: object) -> int:
    """What is looked at, not compared."""
    return 0


def numbers(report: tlnp.Report) -> list[float]:
    return [report.evaluation.circuit.kl, report.evaluation.faithfulness, report.task_p]


USES: dict[str, Use] = {
    "find_nodes": lambda model, prompts: [n for shape in find_nodes(model).present.values() for n in shape],
    "from_masks": lambda model, prompts: tlnp.Circuit.from_masks(model, dict(circuit_of(model))).parameters,
    "check_fits": lambda model, prompts: circuit_of(model).check_fits(model) or prompts.check_fits(model) or 0,
    "correct": lambda model, prompts: len(prompts.correct(model)),
    "tasks.make": lambda model, prompts: tlnp.tasks.make("ioi", model, 4, 0).clean,
    "masks": masked_logits, "applied": applied, "fwd_hooks": with_fwd_hooks, "own loop": trained,
    "Ablation.fit": lambda model, prompts: list(tlnp.Ablation("optimal").fit(model, prompts, [MLP]).constants.values()),
    "evaluate": lambda model, prompts: tlnp.evaluate(model, circuit_of(model), prompts).circuit.kl,
    "prune": searched(lambda masks: lambda prompts: masks.prune(prompts, max_nodes=6, steps=2, exact_tests=0, **QUIET).search_kl),
    "rank": searched(lambda masks: lambda prompts: tlnp.rank(masks, prompts, steps=2, **QUIET).flat),
    "report": lambda model, prompts: numbers(tlnp.report(model, circuit_of(model), prompts, n_random=1, n_subsets=1, max_units=1, **QUIET)),
    "activation_patching": lambda model, prompts: tlnp.crosscheck.activation_patching(model, prompts, ["mlp"], **QUIET)[MLP],
    "attribution_patching": lambda model, prompts: tlnp.crosscheck.attribution_patching(model, prompts, ["mlp"])[MLP],
    "mib.evaluate": lambda model, prompts: tlnp.mib.evaluate(model, scores_at(model), prompts, sizes=(0.1, 0.5, 1.0)).f,
    "token_effects": lambda model, prompts: ran(tlnp.viz.token_effects(model, circuit_of(model), prompts)),
    "kept_heads": lambda model, prompts: ran(tlnp.viz.kept_heads(model, circuit_of(model), prompts)),
    "overview": lambda model, prompts: ran(tlnp.viz.overview(model, circuit_of(model), prompts)),
    "estimate": lambda model, prompts: ran(tlnp.estimate(model, prompts, granularities=["mlp"])),
}


@contextmanager
def settings(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


@contextmanager
def hooked(model: Any, fn: Callable[..., Any]) -> Iterator[None]:
    model.blocks[1].hook_resid_post.add_hook(fn) if hasattr(model.blocks[1], "hook_resid_post") else model.add_hook(
        "blocks.1.hook_resid_post", fn)
    try:
        yield
    finally:
        model.reset_hooks()


def spoil_position_5(stream: Tensor, hook: Any) -> Tensor:
    stream[:, 5] += 0  # fails on prompts of fewer tokens
    return stream


@contextmanager
def masks_on(model: Any, closed: bool = False) -> Iterator[None]:
    masks = model.add_node_masks(("head",))
    if closed:
        masks.set_to(tlnp.Circuit.empty(masks.space))
    try:
        yield
    finally:
        masks.remove()


@contextmanager
def other_thread(model: Any) -> Iterator[None]:
    """Another thread at work on the model meanwhile."""
    entered, done = threading.Event(), threading.Event()

    def work() -> None:
        with temporary_hooks(model, [("blocks.0.hook_resid_post", lambda activation, hook: activation * 2)]):
            entered.set()
            done.wait()

    thread = threading.Thread(target=work)
    thread.start()
    entered.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def in_training(model: Any, dropout: float, checkpointing: bool = False) -> Iterator[None]:
    rates = {module: module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    for module in rates:
        module.p = dropout
    if checkpointing:
        model.original_model.gradient_checkpointing_enable()
    model.train()
    try:
        yield
    finally:
        model.eval()
        model.original_model.gradient_checkpointing_disable()
        for module, rate in rates.items():
            module.p = rate


@contextmanager
def spoiled(model: Any, value: float) -> Iterator[None]:
    weight = model.unembed.weight if hasattr(model.unembed, "weight") else next(model.unembed.parameters())
    before = weight.detach().clone()
    with torch.no_grad():
        weight[-1] = value
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    model.requires_grad_(False)
    try:
        yield
        assert not any(p.requires_grad for p in model.parameters()), "they stay frozen"
    finally:
        model.requires_grad_(True)


@contextmanager
def broken_off(model: Any) -> Iterator[None]:
    """A block that was entered and never left, as after an interrupt; nothing holds it any more."""
    def enter() -> None:
        tlnp.Circuit.empty(find_nodes(model)).applied(model, tlnp.toy.load("ioi", n=2)[1]).__enter__()

    enter()
    yield


@contextmanager
def after_reset(model: Any) -> Iterator[None]:
    """Masks whose hooks the user took off."""
    model.add_node_masks(("head",)).set_to(tlnp.Circuit.empty(find_nodes(model).restrict("head")))
    model.reset_hooks(including_permanent=True)
    yield


@contextmanager
def with_gradients(model: Any) -> Iterator[None]:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    try:
        yield
        assert all(bool((p.grad == 1).all()) for p in model.parameters()), "a user's gradients stay"
    finally:
        model.zero_grad()


def applying(model: Any) -> AbstractContextManager[Any]:
    return tlnp.Circuit.full(find_nodes(model).restrict("mlp")).applied(model, tlnp.toy.load("ioi", n=2)[1])


STATES: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "as it is": lambda model: nullcontext(), "no_grad": lambda model: torch.no_grad(),
    "inference_mode": lambda model: torch.inference_mode(),
    "masks, open": masks_on, "masks, closed": lambda model: masks_on(model, closed=True), "a circuit applied": applying,
    "float64 by default": lambda model: settings(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "bfloat16 by default": lambda model: settings(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "deterministic": lambda model: settings(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True),
    "anomaly mode": lambda model: torch.autograd.detect_anomaly(check_nan=False),
    "training, dropout": lambda model: in_training(model, 0.1), "training, no dropout": lambda model: in_training(model, 0.0),
    "checkpointing": lambda model: in_training(model, 0.0, checkpointing=True),
    "frozen": frozen, "gradients there": with_gradients, "NaN weights": lambda model: spoiled(model, float("nan")),
    "inf weights": lambda model: spoiled(model, float("inf")), "another thread": other_thread, "broken off": broken_off,
    "hooks reset": after_reset, "a hook of one's own": lambda model: hooked(model, lambda stream, hook: stream),
    "a hook that fails": lambda model: hooked(model, spoil_position_5),
}
SAME = ("as it is", "no_grad", "masks, open", "masks, closed", "frozen", "gradients there", "broken off", "hooks reset",
        "float64 by default", "a hook of one's own", "deterministic", "training, no dropout")
ALONE = ("masks", "applied", "fwd_hooks", "own loop", "prune", "rank", "estimate", "Ablation.fit")  # nothing else may be on the model

def retold(prompts: Prompts, **change: Tensor) -> Prompts:
    return replace(prompts, **change)


def padded(prompts: Prompts, right: int) -> Prompts:
    more = lambda value: torch.cat([value, value.new_zeros(len(value), right)], 1)  # noqa: E731
    return retold(prompts, clean=more(prompts.clean), corrupted=more(prompts.corrupted), attention_mask=more(prompts.attention_mask))


def shifted(prompts: Prompts) -> Prompts:
    """Each prompt moved to the right edge."""
    assert prompts.attention_mask is not None
    order = (torch.arange(prompts.clean.shape[1]) + prompts.attention_mask.sum(1, keepdim=True)) % prompts.clean.shape[1]
    moved = {name: getattr(prompts, name).gather(1, order) for name in ("clean", "corrupted", "attention_mask")}
    return Prompts(**moved, answers=prompts.answers, wrong_answers=prompts.wrong_answers)


FORMS: dict[str, Callable[[Prompts], Prompts]] = {
    "int32": lambda p: retold(p, clean=p.clean.int(), corrupted=p.corrupted.int()),
    "uint8": lambda p: retold(p, clean=p.clean.to(torch.uint8)),
    "answers [batch 1]": lambda p: retold(p, answers=p.answers[:, None]),
    "answers with filler": lambda p: retold(p, answers=torch.stack([torch.full_like(p.answers, -1), p.answers], 1)),
    "a mask of floats": lambda p: retold(p, attention_mask=p.attention_mask.half()),  # type: ignore[union-attr]
    "padded more": lambda p: padded(p, right=3), "padded on the left": shifted,
    "padded on both sides": lambda p: shifted(padded(p, right=2)),
    "positions given": lambda p: retold(p, answer_positions=p.answer_positions.int()),  # type: ignore[union-attr]
    "strided": lambda p: retold(p, clean=p.clean.T.contiguous().T), "requires no copy": lambda p: copy.deepcopy(p),
}

ENDS: Counter[str] = Counter()


@pytest.fixture(scope="module")
def world() -> tuple[Any, Prompts, Tensor, dict[str, Any]]:
    """A model, prompts of several lengths, the model's logits, and what every use gives otherwise."""
    model, prompts = tlnp.toy.load("ioi", n=12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        usual = {name: as_tensor(use(model, prompts)) for name, use in USES.items()}
    with torch.no_grad():
        return model, prompts, model(prompts.clean), usual


def as_tensor(value: Any) -> Tensor:
    values = value if isinstance(value, list | tuple) else [value]
    return torch.cat([torch.as_tensor(one, dtype=torch.float64).detach().clone().flatten().cpu() for one in values])


def end_of(use: Callable[[], Any], usual: Tensor) -> str:
    """How a call ended: "same", or the error's type where it is this library's own and in words. Fails for anything else."""
    try:
        found = as_tensor(use())
    except (ValueError, TypeError, RuntimeError, OSError, ArithmeticError, KeyError) as error:
        frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        assert frames[-1].startswith(HERE), f"raw: {type(error).__name__}: {error} from {frames[-1]}"
        assert len(str(error)) > 30, f"no words: {error!r}"
        return type(error).__name__
    if usual.isfinite().all() and not found.isfinite().all():
        return "not finite"
    torch.testing.assert_close(found, usual, rtol=1e-3, atol=1e-4)
    return "same"


def check_clean(model: Any, prompts: Prompts, logits: Tensor) -> None:
    assert not any(point.fwd_hooks for point in dict(model.hook_dict).values())
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(prompts.clean), logits), "the logits are bitwise as before"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("state", STATES)
def test_the_same_or_an_error_in_words(world: Any, use: str, state: str) -> None:
    model, prompts, logits, usual = world
    try:
        with STATES[state](model):
            end = end_of(lambda: USES[use](model, prompts), usual[use])
        prompts.correct(model)  # the next call of any kind clears what was left
        check_clean(model, prompts, logits)
    finally:
        model.reset_hooks(including_permanent=True)
        model.requires_grad_(True).zero_grad()
    assert end == "same" or state not in SAME or (state.startswith("masks") and use in ALONE), f"{end} where the value is known"
    assert end != "not finite" or state in ("NaN weights", "inf weights") and use in ("masks", "applied", "fwd_hooks", "own loop")
    ENDS[end] += 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use", [use for use in USES if use not in ("find_nodes", "from_masks", "tasks.make")])
@pytest.mark.parametrize("form", FORMS)
def test_the_same_prompts_in_another_form(world: Any, use: str, form: str) -> None:
    model, prompts, logits, usual = world
    given = FORMS[form](prompts)
    end = end_of(lambda: USES[use](model, given), usual[use])
    check_clean(model, prompts, logits)
    assert end == "same"
    ENDS[end] += 1


@pytest.mark.slow
def test_so_many_were_tried() -> None:
    """The figure in docs/; run alone, nothing was."""
    assert not ENDS or sum(ENDS.values()) >= 300, ENDS
    print(f"\n{sum(ENDS.values())} tried: {dict(ENDS)}")
