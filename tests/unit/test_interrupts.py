"""Ctrl-C at any line: nothing acts on the model from then on, and the next call of any kind leaves it as it was."""

from __future__ import annotations

import contextlib
import itertools
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import tl_nodeprune as tlnp
from tl_nodeprune.nodes import attachment
from tl_nodeprune.nodes.attachment import temporary_hooks

Toy = tuple[Any, tlnp.PromptPairs]
Line = tuple[str, int]
OURS = str(Path(tlnp.__file__).parent)
SERVING = (contextlib.__file__, torch.utils.hooks.__file__, torch.nn.modules.module.__file__)  # watched where this library calls them
HEAD, MLP = "blocks.1.attn.hook_z", "blocks.0.hook_mlp_out"


def tiny() -> Toy:
    """A model of two layers and four prompts; one weight is frozen by its user, and one hook is there already."""
    from transformer_lens.model_bridge import TransformerBridge

    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, n_positions=8, vocab_size=23, initializer_range=0.3)).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tlnp.toy.FOLDER)
    model = TransformerBridge.boot_transformers("gpt2", hf_model=hf, tokenizer=tokenizer, device="cpu").eval()
    next(iter(model.parameters())).requires_grad_(False)
    tokens = torch.randint(0, 23, (2, 4, 5), generator=torch.Generator().manual_seed(0))
    return model, tlnp.PromptPairs(tokens[0], tokens[1], torch.arange(4), torch.arange(4, 8))

_handed_out: list[tlnp.NodeMasks] = []  # masks that a call returned to its user before it was interrupted


def add(model: Any, *args: Any, **options: Any) -> tlnp.NodeMasks:
    _handed_out.append(model.add_node_masks(*args, **options))
    return _handed_out[-1]


class Interrupt:
    """Raises KeyboardInterrupt once, as the n-th arrival at a line, or only counts arrivals."""

    def __init__(self, line: Line | None = None, n: int = 1) -> None:
        self.line, self.left, self.seen = line, n, dict[Line, int]()

    def __call__(self, frame: FrameType, event: str, arg: object) -> Interrupt | None:
        if event == "call" and not self.watched(frame):
            return None
        if event == "line":
            here = (frame.f_code.co_filename, frame.f_lineno)
            self.seen[here] = self.seen.get(here, 0) + 1
            if here == self.line:
                self.left -= 1
                if not self.left:
                    raise KeyboardInterrupt
        return self

    @staticmethod
    def watched(frame: FrameType | None) -> bool:
        while frame is not None and frame.f_code.co_filename in SERVING:
            frame = frame.f_back
        return frame is not None and frame.f_code.co_filename.startswith(OURS)

    def during(self, call: Callable[[], object]) -> KeyboardInterrupt | None:
        """What was raised, with its traceback and all frames in it."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            call()
        except KeyboardInterrupt as error:
            return error
        finally:
            sys.settrace(before)
        return None


class State:
    """Everything about a model that this library may change."""

    def __init__(self, model: Any, prompts: tlnp.PromptPairs) -> None:
        with torch.no_grad():
            self.logits = model(prompts.clean)
        self.hooks = {(name, table): len(getattr(module, table)) for name, module in model.named_modules()
                      for table in ("_forward_hooks", "_forward_pre_hooks", "fwd_hooks") if hasattr(module, table)}
        self.wants = [p.requires_grad for p in model.parameters()]

    def check(self, other: State, where: str) -> None:
        left = [key for key in self.hooks if self.hooks[key] != other.hooks[key]]
        assert not left, f"{where}: hooks left at {left[:3]}"
        assert self.wants == other.wants, f"{where}: requires_grad"
        assert torch.equal(self.logits, other.logits), f"{where}: logits"


def some_circuit(model: Any) -> tlnp.Circuit:
    space = tlnp.nodes.probe.find_nodes(model).restrict(("head", "mlp"))
    return tlnp.Circuit(space, {key: torch.arange(torch.Size(shape).numel()).view(shape) % 2 for key, shape in space.shapes.items()})


def attach_and_remove(model: Any, prompts: tlnp.PromptPairs) -> None:
    add(model, ("head", "mlp_neuron"))
    model.remove_node_masks()


def in_a_block(model: Any, prompts: tlnp.PromptPairs) -> None:
    """Masks that were handed out stay until the block begins; whenever it ends they act no more."""
    with add(model, ("head", "mlp"), ablation="zero") as masks:
        masks.set_to(tlnp.Circuit.empty(masks.space))
        model(prompts.clean)


def again(model: Any, prompts: tlnp.PromptPairs) -> None:
    add(model, ("head",))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        add(model, ("head",))
    model.remove_node_masks()


def pair(model: Any, prompts: tlnp.PromptPairs) -> None:
    masks = add(model, ("head", "layer"), ablation="interchange")
    masks.set_to(tlnp.Circuit.empty(masks.space))
    with masks.paired(prompts):
        with masks.sampling(torch.Generator().manual_seed(0)), masks.inactive():
            model(prompts.clean)
        with masks.standing_in({hook: torch.zeros(()) for hook in masks.space.hooks}):
            model(prompts.clean)
        model(prompts.clean)
    masks.remove()


def apply(model: Any, prompts: tlnp.PromptPairs) -> None:
    with some_circuit(model).applied(model, prompts):
        model(prompts.clean)


def hook_for_a_while(model: Any, prompts: tlnp.PromptPairs) -> None:
    with temporary_hooks(model, [(HEAD, lambda z, hook: z * 0), (MLP, lambda out, hook: out * 0)]):
        with temporary_hooks(model, [(HEAD, lambda z, hook: z + 1)]):
            model(prompts.clean)


def evaluate(model: Any, prompts: tlnp.PromptPairs) -> None:
    tlnp.evaluate(model, some_circuit(model), prompts)


def prune(model: Any, prompts: tlnp.PromptPairs) -> None:
    masks = add(model, ("head", "mlp"), ablation="mean")
    masks.prune(prompts, held_out=prompts_of(9), max_nodes=3, steps=2, progress=False)
    masks.remove()


def paper(model: Any, prompts: tlnp.PromptPairs) -> None:
    masks = add(model, ("head", "mlp"))
    masks.prune(prompts, held_out=prompts_of(9), objective=tlnp.PaperObjective(steps=2, warmup=1), progress=False)
    masks.remove()


def rank(model: Any, prompts: tlnp.PromptPairs) -> None:
    masks = add(model, ("head", "mlp"))
    tlnp.rank(masks, prompts, steps=1, progress=False)
    masks.remove()


def estimate(model: Any, prompts: tlnp.PromptPairs) -> None:
    tlnp.estimate(model, prompts, held_out=prompts_of(9), granularities=("head",), steps=1)


def sweep(model: Any, prompts: tlnp.PromptPairs) -> None:
    tlnp.sweep(model, prompts, max_kl=(1.0,), seeds=(0,), granularities=("head",), steps=1, progress=False)


def prompts_of(seed: int) -> tlnp.PromptPairs:
    tokens = torch.randint(0, 23, (2, 4, 5), generator=torch.Generator().manual_seed(seed))
    return tlnp.PromptPairs(tokens[0], tokens[1], torch.arange(4), torch.arange(4, 8))


CALLS = (attach_and_remove, in_a_block, again, pair, apply, hook_for_a_while, evaluate, prune, paper, rank, estimate, sweep)
NEXT = (evaluate, apply, hook_for_a_while, attach_and_remove, lambda model, prompts: prompts.correct(model),
        lambda model, prompts: some_circuit(model).fwd_hooks(model, prompts))


def lines_of(call: Any) -> dict[Line, int]:
    watch = Interrupt()
    assert watch.during(lambda: call(*tiny())) is None
    return watch.seen


def interrupted(call: Any, at: Iterable[tuple[Line, int]]) -> int:
    """Interrupt a call at lines (the n-th arrival there), then make another call; the number of times.

    Masks that the call's user had in hand are still attached, and come off as ever; all else does nothing at once, and is gone with the
    next call.
    """
    model, prompts = tiny()
    before, nexts, n = State(model, prompts), itertools.cycle(NEXT), 0
    for line, arrival in at:
        vars(model.blocks).pop(attachment._SLOT, None)  # as if the library had never seen the model
        _handed_out.clear()
        error = Interrupt(line, arrival).during(lambda: call(model, prompts))  # its frames live on here, as they do in a notebook
        where = f"{Path(line[0]).name}:{line[1]}, arrival {arrival}"
        if _handed_out and _handed_out[-1].attached:
            model.remove_node_masks()
        else:
            with torch.no_grad():
                assert torch.equal(model(prompts.clean), before.logits), f"{where}: logits before the next call"
            next(nexts)(model, prompts)
        State(model, prompts).check(before, where)
        n += error is not None
    return n


@pytest.mark.parametrize("call", [attach_and_remove, in_a_block, again, pair, apply, hook_for_a_while, evaluate])
def test_some_lines(call: Any) -> None:
    seen = lines_of(call)
    ours = [line for line in seen if line[0].endswith(("attachment.py", "scope.py", "contextlib.py"))]
    assert interrupted(call, [(line, 1) for line in ours[::6]]) == len(ours[::6])


@pytest.mark.slow
def test_every_line() -> None:
    """Each line of the library, and of contextlib and torch where it calls them, at its first, second and last arrival in some call."""
    done, n = set[tuple[Line, int]](), 0
    for call in CALLS:
        at = [(line, arrival) for line, n in lines_of(call).items() for arrival in sorted({1, min(2, n), n})]
        close = ("attachment.py", "scope.py", "masks.py", "contextlib.py")
        new = [(line, arrival) for line, arrival in at if (line, min(arrival, 2)) not in done or line[0].endswith(close)]
        done |= {(line, min(arrival, 2)) for line, arrival in at}
        n += (found := interrupted(call, new))
        assert found > 0.9 * len(new)  # the last arrivals at a few lines are of a model's very first call
    assert n > 2000
