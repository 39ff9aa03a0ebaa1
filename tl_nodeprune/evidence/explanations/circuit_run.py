"""A circuit on some prompts, run as it is or with one thing changed: what an explanation and path patching are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_nodeprune.circuit import Circuit
from tl_nodeprune.evidence.units import Unit, closed
from tl_nodeprune.masks import MaskedModel
from tl_nodeprune.nodes import HOOKS, Attachment, GateKey, HookFn
from tl_nodeprune.prompts import PromptPairs, positions

Keep = Callable[[Tensor], Tensor]


class CircuitRun:
    """A circuit on a batch of prompts; calling it is one forward.

    cuts: the units that may be cut from it. Stand-ins are held at the hook points of these and of what the circuit prunes, and nowhere
    else. sliced: see `probe.can_slice`.
    """

    def __init__(self, model: Any, circuit: Circuit, prompts: PromptPairs, cuts: Sequence[Unit] = (), *, sliced: bool = False) -> None:
        self.model, self.circuit, self.prompts = model, circuit, prompts
        without = closed(circuit, cuts)
        self.hooks = [hook for hook in circuit if not bool((circuit[hook] == 1).all() and (without[hook] == 1).all())]
        self._masked = MaskedModel(model, prompts, circuit.ablation, self.hooks, batch_size=len(prompts), sliced=sliced)
        self._stand_ins = self._masked.stand_ins(torch.arange(len(prompts)))

    def __call__(self, *, without: Sequence[Unit] = (), keep: Mapping[str, Keep] | None = None,
                 then: Sequence[tuple[str, HookFn]] = (), times: int = 1, freeze: bool = False
                 ) -> tuple[Float[Tensor, "row d_vocab"], dict[str, Tensor]]:
        """Logits at the answer positions, and what is kept of activations, by hook name. A row is a prompt, all of them `times` over.

        without: units cut from the circuit. then: hooks that run after the circuit's own. keep: by hook name, what to take of the
        activation, after all of these. freeze: no weight takes part in a gradient.
        """
        circuit = closed(self.circuit, without) if without else self.circuit
        masks = {hook: circuit[hook] for hook in self.hooks}
        stand_ins = {hook: self._repeated(value, times) for hook, value in self._stand_ins.items()}
        seen: dict[str, Tensor] = {}
        takers = [(name, _taker(seen, name, take)) for name, take in (keep or {}).items()]
        with Attachment(self.model, freeze=freeze).on():
            rows = torch.arange(len(self.prompts)).repeat(times)
            return self._masked.logits(rows, masks, stand_ins, also=[*then, *takers]), seen

    def stand_in(self, hook: str) -> Tensor:
        """What a closed node at a hook point takes. Raises KeyError where it is not held."""
        return self._stand_ins[hook]

    def score(self, logits: Float[Tensor, "row d_vocab"]) -> Float[Tensor, "time prompt"]:
        """Logit differences, answer minus wrong answer."""
        with torch.no_grad():
            return torch.stack([self.prompts.logit_diff(part) for part in logits.split(len(self.prompts))]).cpu()

    def at_answer(self, activation: Float[Tensor, "prompt pos ..."]) -> Float[Tensor, "prompt ..."]:
        """An activation at the answer positions, float32."""
        at = positions(self.prompts).to(activation.device)
        return activation.detach()[torch.arange(len(activation), device=activation.device), at].float()

    def _repeated(self, value: Tensor, times: int) -> Tensor:
        return value.repeat(times, *[1] * (value.ndim - 1)) if self.circuit.ablation.name == "interchange" and times > 1 else value


def output_hook(unit: Unit) -> str:
    """Where what a head, an attention or an MLP block adds to the stream can be seen, that of a head within its attention block's."""
    return f"blocks.{unit.layer}.{HOOKS['mlp' if unit.granularity == 'mlp' else 'attn']}"


def adds_to_stream(circuit: Circuit, unit: Unit) -> bool:
    """Whether `output_hook` holds what is added to the stream, and not something that the block goes on to scale or norm."""
    name = "mlp" if unit.granularity == "mlp" else "attn"
    return unit.granularity in ("head", "attn", "mlp") and GateKey(name, unit.layer) in circuit.space.present


def detached(activation: Tensor) -> Tensor:
    """An activation as it is, without its history."""
    return activation.detach()


def _taker(seen: dict[str, Tensor], name: str, take: Keep) -> HookFn:
    def keep(activation: Tensor, hook: Any) -> None:
        seen[name] = take(activation)
    return keep
