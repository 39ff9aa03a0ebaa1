"""Which heads a ranking has highest, and where they look from the position that the answer is read at."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch import Tensor

import tl_nodeprune as tlnp
from tl_nodeprune.masks.landscape import Landscape
from tl_nodeprune.nodes.hooks import capture
from tl_nodeprune.nodes.space import GateKey
from tl_nodeprune.prompts.pairs import positions

TOP, SHOWN = 0.05, 12  # share of the nodes that count for a head; heads shown


def ranked(scores: tlnp.NodeScores) -> pd.DataFrame:
    """A row per head, the highest first: how many of its dims are among the top of all nodes, and the sum of how far they are inside it."""
    order = torch.empty(scores.n)
    order[scores.flat.argsort(descending=True, stable=True)] = 1 - torch.arange(scores.n) / scores.n
    inside = ((order - (1 - TOP)) / TOP).clamp(min=0)
    gates = tlnp.NodeScores.from_flat(inside, scores.space).gates
    rows = [{"layer": key.layer, "head": head, "score": float(gate[head].sum()), "dims in top": int((gate[head] > 0).sum())}
            for key, gate in gates.items() if key.granularity == "attn_neuron" for head in range(len(gate))]
    return pd.DataFrame(rows).sort_values("score", ascending=False, ignore_index=True)


def places(prompts: tlnp.PromptPairs) -> dict[str, Tensor]:
    """Positions [prompt pos] that a head may look at; for one answer each."""
    assert prompts.attention_mask is not None
    real = prompts.attention_mask
    first = torch.zeros_like(real)
    first[:, 0] = True
    return {"to the answer's position": (prompts.clean == prompts.answers[:, None]) & real,
            "to the wrong answer's": (prompts.clean == prompts.wrong_answers[:, None]) & real,
            "to what the corrupted prompt changes": (prompts.clean != prompts.corrupted) & real, "to the first position": first}


def attention(model: Any, prompts: tlnp.PromptPairs, batch_size: int = 32) -> dict[str, Tensor]:
    """Mean attention from the answer's reading position, [layer head] for each of `places`; NaN where no prompt has such a position."""
    hooks = [f"blocks.{layer}.attn.hook_pattern" for layer in range(int(model.cfg.n_layers))]
    found: dict[str, list[Tensor]] = {}
    for some in prompts.batches(batch_size):
        seen, rows = capture(model, some.clean, hooks), torch.arange(len(some))
        pattern = torch.stack([seen[hook].float().cpu()[rows, :, positions(some).cpu()] for hook in hooks])  # [layer prompt head pos]
        for name, there in places(some).items():
            summed = (pattern * there.cpu()[:, None].float()).sum(-1)
            found.setdefault(name, []).append(summed.masked_fill(~there.any(1).cpu()[:, None], torch.nan))
    return {name: torch.cat(parts, 1).nanmean(1) for name, parts in found.items()}


def table(scores: tlnp.NodeScores, land: Landscape, shown: int = SHOWN) -> pd.DataFrame:
    """The highest heads with their attention, and the KL on the landscape's prompts with that head alone ablated; last the mean head.
    Call it with the masks inactive."""
    heads, looks = ranked(scores)[:shown], attention(land.reference.model, land.reference.prompts)
    ids, rows = land.gates(torch.arange(land.n)), torch.arange(land.n_prompts)
    alone = []
    for row in heads.itertuples():
        flat = torch.ones(1, land.n)
        flat[0, ids[GateKey("attn_neuron", row.layer)][row.head]] = 0
        alone.append(float(land.losses(flat, rows).loss.mean()))
    for name, values in looks.items():
        heads[name] = [float(values[row.layer, row.head]) for row in heads.itertuples()]
    heads["KL with it alone ablated"] = alone
    mean = {"layer": "all", "head": "mean", **{name: float(values.nanmean()) for name, values in looks.items()}}
    return pd.concat([heads.astype({"layer": object, "head": object}), pd.DataFrame([mean])], ignore_index=True)
