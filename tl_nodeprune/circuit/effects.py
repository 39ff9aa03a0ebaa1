"""Effects of single nodes, in a circuit's own keys and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_nodeprune.nodes import GateKey, NodeSpace, check_types, figures, spread

_AXES = {"head": ("head",), "attn_neuron": ("head", "d_head"), "mlp_neuron": ("d_mlp",), "mlp_out": ("d_model",)}
DIRECTIONS: tuple[str, ...] = ("denoise", "noise")


@dataclass(frozen=True, eq=False, repr=False)
class Effects(Mapping[str, Tensor]):
    """What putting one node's activation from the other run into this run adds to the metric, node by node.

    As a Mapping: hook name -> effects at the hook's shape, as a circuit's masks; where several granularities share a hook point (head and
    attn_neuron; mlp and mlp_out), the finest one measured, a head's effect standing at each of its dims. `of(granularity)` has every one.

    gates: by (granularity, layer), shaped as the gate tensors, float32 on the CPU.
    direction: "denoise" (clean activation into the corrupted run) or "noise" (corrupted activation into the clean run).
    method: "activation patching" (exact) or "attribution patching" (first order).
    clean, corrupted: the metric of the two runs without a patch, mean over prompts. n_prompts: how many.
    by_prompt: as gates, with a last dim for the prompts, of which gates is the mean; empty for attribution patching. base: the metric of
    the run that is patched, without a patch [prompt].
    """

    gates: Mapping[GateKey, Tensor]
    space: NodeSpace
    direction: str
    method: str
    clean: float
    corrupted: float
    n_prompts: int
    by_prompt: Mapping[GateKey, Tensor] = field(default_factory=dict)
    base: Tensor | None = None

    def __getitem__(self, hook: str) -> Tensor:
        if hook not in self.space.hooks:
            raise KeyError(f"{hook!r} was not patched; patched were {', '.join(self.space.hooks)}.")
        finest, width = self.space.at(hook)[-1], self.space.width(hook)
        return spread(self.gates[finest], len(width)).expand(width).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.space.hooks)

    def __len__(self) -> int:
        return len(self.space.hooks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Effects) or set(self.gates) != set(other.gates):
            return False
        return self.direction == other.direction and all(torch.equal(gate, other.gates[key]) for key, gate in self.gates.items())

    __hash__ = None  # type: ignore[assignment]

    @property
    def granularities(self) -> tuple[str, ...]:
        """The granularities measured, coarse to fine."""
        return self.space.granularities

    def of(self, granularity: str) -> dict[int, Float[Tensor, "..."]]:
        """The effects of one granularity's nodes: layer -> tensor shaped as the gate tensor ("head" [head], "mlp" []).

        Raises: KeyError for a granularity that was not measured.
        """
        check_types(Effects.of, locals())
        if granularity not in self.granularities:
            raise KeyError(f"granularity {granularity!r} was not patched; patched were {', '.join(self.granularities)}.")
        keys = sorted((key for key in self.gates if key.granularity == granularity), key=lambda key: key.layer)
        return {key.layer: self.gates[key].clone() for key in keys}

    def normalised(self) -> Effects:
        """Effects on the metric normalised to 0 in the corrupted run and 1 in the clean run: `effect / (m(clean) - m(corrupted))`.

        1: that node alone brings all of it back ("denoise"); -1: without that node all of it is lost ("noise").
        """
        span = self.clean - self.corrupted
        gates, by_prompt = ({key: gate / span for key, gate in effects.items()} for effects in (self.gates, self.by_prompt))
        base = None if self.base is None else (self.base - self.corrupted) / span
        return replace(self, gates=gates, by_prompt=by_prompt, base=base, clean=1.0, corrupted=0.0)

    def to_patching_result(self, granularity: str = "head") -> Any:
        """One granularity's effects as TransformerLens' own `transformer_lens.patching.PatchingResult`, which has intervals over prompts, a
        permutation test and a table: the metric with each node patched, [layer (head) ... prompt], and without as its baseline.

        Of attribution patching there are means only, as of a sweep with reduce="mean". Where layers lack the granularity, or have other
        shapes, the nodes are in one flat axis, in the order of `index_df`.

        Raises: KeyError for a granularity that was not measured; ImportError on TransformerLens 3, which has no such type.
        """
        check_types(Effects.to_patching_result, locals())
        try:
            from transformer_lens.patching import PatchingResult
        except ImportError as error:
            raise ImportError("this TransformerLens has no PatchingResult, 4.3 has; effects.to_frame() is a table of the same.") from error
        layers = self.of(granularity)
        keys = [GateKey(granularity, layer) for layer in layers]
        base = self.base if self.base is not None and self.by_prompt else torch.tensor(
            self.corrupted if self.direction == "denoise" else self.clean)
        values = [(self.by_prompt[key] if self.by_prompt else self.gates[key]) + base for key in keys]
        axes = ["layer", *_AXES.get(granularity, ())]
        index = [(key.layer, *map(int, at)) for key in keys for at in torch.ones(self.gates[key].shape).nonzero()]
        regular = list(layers) == list(range(self.space.n_layers)) and len({gate.shape for gate in layers.values()}) == 1
        stacked = torch.stack(values) if regular else torch.cat([value.reshape(-1, *base.shape) for value in values])
        return PatchingResult(values=stacked, axis_names=axes if regular else [], index_df=pd.DataFrame(index, columns=axes),
                              metric_names=["metric"], reduced=not self.by_prompt, baseline=base)

    def to_frame(self) -> pd.DataFrame:
        """A row per node, the largest absolute effect first: granularity, layer, index (within the layer), effect."""
        rows = [{"granularity": key.granularity, "layer": key.layer, "index": tuple(index), "effect": float(gate[tuple(index)])}
                for key, gate in self.gates.items() for index in torch.ones(gate.shape).nonzero().tolist()]
        return pd.DataFrame(rows).sort_values("effect", key=lambda column: -column.abs(), kind="stable", ignore_index=True)

    def __repr__(self) -> str:
        counts = ", ".join(f"{total} {name}" for name, total in self.space.totals().items())
        return (f"Effects({counts}; {self.method}, {self.direction}; metric {figures(self.clean)} clean, "
                f"{figures(self.corrupted)} corrupted, {self.n_prompts} prompts)")
