"""One family against the oracle, and the page that lists them all.

    python tests/integration/conformance.py > docs/reference/architectures.md
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import pytest
import torch
import transformers
from families import bridge_of, families, hf_family
from integration_support import random_pairs, run
from oracle import Oracle

import tl_nodeprune as tlnp
from tl_nodeprune.nodes.space import GateKey, NodeSpace

NODE = {"layer": (), "attn": (), "mlp": (), "head": (2,), "attn_neuron": (1, 3), "mlp_neuron": (5,), "mlp_out": (7,)}
TOLERANCE = 1e-4  # of the largest logit
Ablated = dict[tuple[str, int], torch.Tensor]


@dataclass
class Finding:
    """What came of a family.

    refused: the error, of the bridge (`by` "TransformerLens") or of add_node_masks.
    worst: the largest difference from the oracle, as a share of the largest logit, and where.
    moved: the smallest change that closing a node made, likewise.
    parameters: as the library counts them, and as Hugging Face has them.
    """

    kind: str
    refused: str = ""
    by: str = ""
    space: NodeSpace | None = None
    worst: float = 0.0
    where: str = ""
    moved: float = float("inf")
    parameters: tuple[int, int] = (0, 0)

    @property
    def agrees(self) -> bool:
        """Whether all that is gated does what the oracle does, and as many weights are counted as there are."""
        return self.space is not None and self.worst <= TOLERANCE and self.parameters[0] == self.parameters[1]


def conform(kind: str) -> Finding:
    """Every granularity of a family, in every layer: one node closed, and all at .5, under both ablations, next to the oracle."""
    hf, prompts, found = hf_family(kind), random_pairs(), Finding(kind)
    untouched = copy.deepcopy(hf)
    with torch.no_grad():
        plain = untouched(prompts.clean).logits
    try:
        model = bridge_of(hf)
        open_ = run(model, prompts.clean)
    except Exception as error:  # whatever the bridge does, this library can do nothing about it
        found.refused, found.by = f"{type(error).__name__}: {error}", "TransformerLens"
        if "model" in locals():
            with pytest.raises(ValueError, match="this model's forward fails"):
                tlnp.add_node_masks(model)
        return found
    _compare(found, open_, plain, "nothing closed")
    if found.worst > TOLERANCE:
        found.refused, found.by = "its logits are not Hugging Face's", "TransformerLens"
        return found
    for ablation in ("zero", "interchange"):
        try:
            masks = tlnp.add_node_masks(model, ablation=ablation)
        except ValueError as error:
            found.refused, found.by = str(error), "tl_nodeprune"
            return found
        found.space, oracle = masks.space, Oracle(untouched)
        ablated = oracle.values(prompts.corrupted, map(tuple, masks.space.shapes)) if ablation == "interchange" else {}
        try:
            for key in masks.space.shapes:
                _check_node(found, masks, oracle, prompts, ablated, key, plain)
            for granularity in masks.space.granularities:
                _check_halves(found, masks, oracle, prompts, ablated, granularity)
        finally:
            masks.remove()
    found.parameters = tlnp.Circuit.full(found.space).parameters_total, _matrices(oracle)
    return found


def _check_node(found: Finding, masks: Any, oracle: Oracle, prompts: Any, ablated: Ablated, key: GateKey, plain: torch.Tensor) -> None:
    with torch.no_grad():
        masks.score(key)[NODE[key.granularity]] = masks.gate.closed_score
    got = _run(masks, prompts)
    with torch.no_grad():
        masks.score(key).fill_(masks.gate.open_score)
    want = oracle.run(prompts.clean, {tuple(key): oracle.scaled(*key, NODE[key.granularity], 0.0, ablated.get(key))})
    _compare(found, got, want, f"{key.granularity} of layer {key.layer} closed, {masks.ablation.name} ablation")
    found.moved = min(found.moved, float((want - plain).abs().max() / plain.abs().max()))


def _check_halves(found: Finding, masks: Any, oracle: Oracle, prompts: Any, ablated: Ablated, granularity: str) -> None:
    keys = [key for key in masks.space.shapes if key.granularity == granularity]
    with torch.no_grad():
        for key in keys:
            masks.score(key).fill_(0.0)
            assert masks.gate_values(key).eq(0.5).all()
    got = _run(masks, prompts)
    with torch.no_grad():
        for key in keys:
            masks.score(key).fill_(masks.gate.open_score)
    want = oracle.run(prompts.clean, {tuple(key): oracle.scaled(*key, (), 0.5, ablated.get(key)) for key in keys})
    _compare(found, got, want, f"all {granularity} nodes at .5, {masks.ablation.name} ablation")


def _run(masks: Any, prompts: Any) -> torch.Tensor:
    with masks.paired(prompts):
        return run(masks.model, prompts.clean)


def _compare(found: Finding, got: torch.Tensor, want: torch.Tensor, where: str) -> None:
    difference = float((got - want).abs().max() / want.abs().max())
    if difference >= found.worst:
        found.worst, found.where = difference, where


def _matrices(oracle: Oracle) -> int:
    """Entries of the weight matrices in the decoder layers, as Hugging Face has them."""
    return sum(p.numel() for name, p in oracle.layers.named_parameters() if p.ndim > 1 and "norm" not in name and "bias" not in name)


def row(found: Finding) -> str:
    """A family's line in the table."""
    names = f"| {found.kind} | {families()[found.kind]} |"
    if found.space is None:
        return f"{names} nothing | refused by {found.by}: {_plain(found.refused)} |"
    layers = {name: sum(key.granularity == name for key in found.space.shapes) for name in found.space.granularities}
    everywhere = [name for name, n in layers.items() if n == found.space.n_layers]
    gated = "all" if len(everywhere) == len(tlnp.GRANULARITIES) else ", ".join(
        name if name in everywhere else f"{name} ({n} of {found.space.n_layers} layers)" for name, n in layers.items())
    reasons: dict[str, list[str]] = {}
    for name, why in found.space.lacking.items():
        reasons.setdefault(_plain(why), []).append(name)
    return f"{names} {gated} | {'; '.join(', '.join(lacking) + ': ' + why for why, lacking in reasons.items())} |"


def _plain(text: str) -> str:
    """A reason for a table of families, without what is of one layer only."""
    return re.sub(r"blocks\.\d+\.", "", re.sub(r"block \d+", "a block", text.splitlines()[0])).removesuffix(".").replace("|", "/")


def page(findings: list[Finding]) -> str:
    """The whole page."""
    gated = [found for found in findings if found.space is not None]
    if wrong := [found for found in gated if not found.agrees]:
        raise AssertionError(f"neither right nor refused: {wrong}")
    return HEAD.format(
        lens=metadata.version("transformer_lens"), transformers=transformers.__version__, n=len(findings), gated=len(gated),
        full=sum(found.space.granularities == tlnp.GRANULARITIES for found in gated if found.space),
    ) + "\n".join(map(row, findings)) + "\n"


HEAD = """# Architectures

`tests/integration/conformance.py` makes this page. It builds a tiny random model of each of the {n} decoder families that both
transformers {transformers} and TransformerLens {lens} know, and gates whatever `add_node_masks` finds in it. For each granularity and layer
it closes one node, then sets all masks of the granularity to .5, under zero and interchange ablation. The logits must agree with
those of an untouched Hugging Face copy on which plain torch hooks do the same, to 1e-4 of the largest logit, and the count of
weights with Hugging Face's. {gated} families have nodes, {full} of them of every granularity.

No list of models decides what is gated. `add_node_masks` runs one forward of three tokens in which it changes each block's hook points:

- **layer**: the block's output is its input plus something, and the next block starts from it.
- **attn, mlp, mlp_out**: a change at the hook point moves the block's output by just as much.
- **head, attn_neuron**: one weight matrix reads `hook_z`, which has as many heads as there are attention patterns.
- **mlp_neuron**: one weight matrix reads `hook_post`, and nothing else goes into the MLP's output. Experts of a mixture have no
  neuron nodes.

What a model lacks is left out by default. Asked for by name, it is a `ValueError` that gives the reason in the last column. Layers of
one model may differ: "1 of 3 layers" means of the tiny model's three.

| model type | class | gated | not gated, and why |
|---|---|---|---|
"""


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(page([conform(kind) for kind in families()]), end="")
