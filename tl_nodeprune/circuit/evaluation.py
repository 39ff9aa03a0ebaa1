"""How faithful a circuit is: its metrics beside the full model's and the fully ablated model's."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_nodeprune.circuit.circuit import Circuit
from tl_nodeprune.masks import MaskedModel, kl_divergence, masks_off
from tl_nodeprune.nodes import Figured, check_counts, check_finite, check_ready, check_types, figures, rounding
from tl_nodeprune.prompts import PromptPairs


@dataclass(frozen=True, repr=False)
class Metrics(Figured):
    """Means over prompts. kl: KL(full || this), nats. accuracy: share with answer logit > wrong logit. logit_diff: answer logit -
    wrong logit. exact_match: share with the full model's most likely token."""

    kl: float
    accuracy: float
    logit_diff: float
    exact_match: float


@dataclass(frozen=True, eq=False)
class PromptMetrics:
    """What circuits do on each prompt, at the answer position. logit_diff: answer logit - wrong logit; kl: KL(full || circuit), nats;
    agrees: the full model's most likely token is theirs too."""

    logit_diff: Float[Tensor, "circuit prompt"]
    kl: Float[Tensor, "circuit prompt"]
    agrees: Bool[Tensor, "circuit prompt"]

    @classmethod
    def of(cls, logits: Float[Tensor, "row d_vocab"], full: Float[Tensor, "prompt d_vocab"], prompts: PromptPairs) -> PromptMetrics:
        """Of answer logits, a row per circuit and prompt. Raises: FloatingPointError for a KL that is NaN or inf."""
        rows = torch.arange(len(logits), device=full.device) % len(prompts)
        with torch.no_grad():
            diff, kl = torch.cat([prompts.logit_diff(part) for part in logits.split(len(prompts))]), kl_divergence(logits, full[rows])
        check_finite(kl, "the KL of the circuit")
        agrees = logits.argmax(-1) == full.argmax(-1)[rows]
        return cls(*(value.view(-1, len(prompts)).cpu() for value in (diff, kl, agrees)))

    def __len__(self) -> int:
        return len(self.kl)

    def split(self, *sizes: int) -> list[PromptMetrics]:
        """The circuits in consecutive parts."""
        return [PromptMetrics(*part) for part in zip(*(t.split(list(sizes)) for t in (self.logit_diff, self.kl, self.agrees)), strict=True)]

    @property
    def means(self) -> Metrics:
        """Over prompts and circuits."""
        return Metrics(kl=float(self.kl.mean()), accuracy=float((self.logit_diff > 0).float().mean()),
                       logit_diff=float(self.logit_diff.mean()), exact_match=float(self.agrees.float().mean()))


@dataclass(frozen=True)
class Evaluation:
    """A circuit's metrics beside those of the full model and of the model with every node of the circuit's space ablated.

    faithfulness: (m(circuit) - m(ablated)) / (m(full) - m(ablated)) for the mean logit difference m; 1 = as the full model,
    NaN where ablation changes nothing. ablation, n_prompts: what the numbers hold for.
    """

    circuit: Metrics
    full: Metrics
    ablated: Metrics
    faithfulness: float
    ablation: str
    n_prompts: int

    @property
    def kl(self) -> float:
        return self.circuit.kl

    @property
    def accuracy(self) -> float:
        return self.circuit.accuracy

    @property
    def logit_diff(self) -> float:
        return self.circuit.logit_diff

    @property
    def exact_match(self) -> float:
        return self.circuit.exact_match

    def to_frame(self) -> pd.DataFrame:
        """A row for the circuit, the full and the ablated model each, a column per metric; faithfulness last."""
        table = pd.DataFrame({name: asdict(getattr(self, name)) for name in ("circuit", "full", "ablated")}).T
        table["faithfulness"] = [self.faithfulness, 1.0, 0.0]
        return table

    def __repr__(self) -> str:
        head = f"{self.n_prompts} prompts, {self.ablation} ablation"
        return f"{head}\n{self.to_frame().to_string(float_format=figures)}"


def evaluate(model: Any, circuit: Circuit, prompts: PromptPairs, *, batch_size: int = 64) -> Evaluation:
    """Run the circuit, the full model and the fully ablated model on prompts, under the ablation the circuit was found under.

    Masks that are attached are left out during the call.

    model: the model that the circuit is of.
    circuit: the circuit, with its ablation.
    prompts: the pairs to judge on: best those that took no part in the search.
    batch_size: prompts per forward.

    Raises: ValueError where the circuit or the prompts do not fit the model, or corrupted prompts are missing
    under interchange ablation; TypeError for what is not a Circuit or PromptPairs; RuntimeError where a circuit is applied already, another
    thread is at work on the model, or it is in training mode with dropout or gradient checkpointing; FloatingPointError for NaN or inf.
    """
    check_types(evaluate, locals())
    check_counts(batch_size=batch_size)
    with masks_off(model):
        check_ready(model)
        circuit.check_fits(model)
        prompts.check_fits(model)
        prompts.check_corrupted(circuit.ablation.name)
        runs = MaskedModel(model, prompts, circuit.ablation, circuit.space.hooks, batch_size=batch_size)
        full = runs.all_logits(of="the full model")
        logits = {"circuit": runs.all_logits(circuit), "full": full,
                  "ablated": runs.all_logits({hook: torch.zeros_like(mask) for hook, mask in circuit.items()})}
    metrics = {name: PromptMetrics.of(each, full, prompts).means for name, each in logits.items()}
    span = metrics["full"].logit_diff - metrics["ablated"].logit_diff
    gained = metrics["circuit"].logit_diff - metrics["ablated"].logit_diff
    told_apart = abs(span) > rounding(model, prompts.logit_diff(full))
    return Evaluation(**metrics, faithfulness=gained / span if told_apart else float("nan"), ablation=circuit.ablation.name,
                      n_prompts=len(prompts))
