"""Does another method agree? Effects of single nodes by activation patching, exact and first order, in a circuit's own keys and shapes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens import patching

from tl_nodeprune.circuit import DIRECTIONS, Effects
from tl_nodeprune.evidence.agreement import Agreement, GranularityAgreement, NodeScore, agreement
from tl_nodeprune.masks import LossFn, masks_off
from tl_nodeprune.nodes import (
    GateKey,
    NodeSpace,
    answer_logits,
    can_slice,
    capture_nodes,
    check_counts,
    check_finite,
    check_ready,
    check_types,
    device_of,
    find_nodes,
    mask_hooks,
    temporary_hooks,
)
from tl_nodeprune.prompts import PromptPairs, positions

__all__ = [
    "COARSE", "Agreement", "Effects", "GranularityAgreement", "NodeScore", "activation_patching", "agreement", "attribution_patching",
]

COARSE = ("attn", "mlp", "head")


def logit_difference(logits: Float[Tensor, "batch d_vocab"], full: Float[Tensor, "batch d_vocab"],
                     prompts: PromptPairs) -> Float[Tensor, "batch"]:
    """The default metric: answer logit - wrong logit; see `PromptPairs.logit_diff`."""
    return prompts.logit_diff(logits)


def activation_patching(
    model: Any, prompts: PromptPairs, granularities: str | Iterable[str] | None = COARSE, *, direction: str = "denoise",
    metric: LossFn = logit_difference, batch_size: int = 256, progress: bool = True,
) -> Effects:
    """The effect of every node by exact patching: one node's activation, at all positions, from the other run of the pair.

    `effect = m(run with this node patched) - m(run)`, m the mean metric over prompts, in the metric's own unit (logits). "denoise": the
    corrupted run, patched with the clean activation; a node that helps has a positive effect. "noise": the clean run, patched with the
    corrupted activation; a node that helps has a negative one. `.normalised()` gives shares of the logit difference recovered, or lost.
    A layer's activation is what the block adds to the residual stream.

    Heads come from `transformer_lens.patching.get_act_patch_attn_head_out_all_pos`, which shows a bar of its own; with progress=False,
    and where it does not run (blocks without attention, a model in training mode), and for all other nodes, many nodes are patched in one
    forward, each in rows of its own. Attached masks are left out during the call.

    granularities: those of "attn", "mlp", "head" that the model has by default; None: all; finer ones cost one row per node and prompt.
    metric: fn(logits [batch d_vocab], clean run's logits [batch d_vocab], prompts) -> [batch], at the answer positions.
    batch_size: rows (prompts x nodes) in one forward.

    Raises: ValueError for a granularity or direction that is unknown or that the model lacks, prompts that do not fit the model, a metric
    that is the same on clean and corrupted prompts or not [batch]; TypeError for prompts that are not PromptPairs; RuntimeError where
    a circuit is applied or the model is in training mode with dropout; FloatingPointError for NaN or inf.
    """
    check_types(activation_patching, locals())
    with masks_off(model), torch.no_grad():
        task = _task(model, prompts, granularities, direction, metric, batch_size)
        heads = _heads_for_transformer_lens(model, task.space) if progress else []
        gains = {key: torch.zeros(*shape, len(prompts), dtype=torch.float32) for key, shape in task.space.shapes.items()}
        for batch in task.batches() if heads else ():
            for key, found in zip(heads, _patch_heads(task, batch), strict=True):
                gains[key][:, batch.rows] = found.cpu()
        others = [key for key in gains if key not in heads]
        with tqdm(total=sum(gains[key].numel() for key in others), desc="patch", disable=not (progress and others)) as bar:
            for batch in task.batches() if others else ():
                n = len(batch.prompts)
                for key, nodes in _groups(task.space, others, max(1, batch_size // n)):
                    gains[key].view(-1, len(prompts))[nodes[:, None], batch.rows] = _patch(task, batch, key, nodes).cpu()
                    bar.update(len(nodes) * n)
    return task.effects({key: gain.mean(-1) for key, gain in gains.items()}, "activation patching", gains)


def attribution_patching(
    model: Any, prompts: PromptPairs, granularities: str | Iterable[str] | None = None, *, direction: str = "denoise",
    metric: LossFn = logit_difference, batch_size: int = 64,
) -> Effects:
    """The first-order form of `activation_patching`: one forward and one backward per batch for all nodes together (arXiv:2310.10348).

    `effect = sum over positions and dims of (source - activation) * d m / d activation`, mean over prompts: the gradient is taken in
    the run that is patched (corrupted for "denoise", clean for "noise"), source is the other run. Effects at one hook point add up.

    granularities: None: all that the model has. batch_size: prompts in one forward. All else, and errors, as in `activation_patching`.
    """
    check_types(attribution_patching, locals())
    with masks_off(model):
        check_ready(model, gradient=True)
        with torch.no_grad():
            task = _task(model, prompts, granularities, direction, metric, batch_size)
        sums = {hook: torch.zeros(task.space.width(hook), dtype=torch.float32) for hook in task.space.hooks}
        for batch in task.batches():
            for hook, grad in _slopes(task, batch).items():
                sums[hook] += grad.cpu()
    sizes = {key: len(shape) for key, shape in task.space.shapes.items()}
    gates = {key: (total.flatten(n).sum(-1) if total.ndim > n else total.clone()) / len(task.prompts)
             for key, n in sizes.items() for total in [sums[key.hook]]}
    return task.effects(gates, "attribution patching")


@dataclass(frozen=True)
class _Batch:
    """Prompts that run together. rows: which they are. tokens: of the run to patch. source: what every hook point adds in the other run.
    full: the clean run's logits [batch d_vocab]. base: the metric of the run without a patch [batch]."""

    prompts: PromptPairs
    rows: Tensor
    tokens: Tensor
    source: dict[str, Tensor]
    full: Tensor
    base: Tensor
    metric: LossFn

    def gain(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, "batch"]:
        """How much more of the metric than without a patch."""
        return _measured(self.metric, logits, self.full, self.prompts) - self.base


@dataclass(frozen=True)
class _Task:
    """A run to patch and a run to patch from, checked. full: the clean run's logits [prompt d_vocab]. clean, corrupted: the metric of
    the two [prompt]."""

    model: Any
    prompts: PromptPairs
    space: NodeSpace
    direction: str
    metric: LossFn
    batch_size: int
    sliced: bool
    full: Tensor
    clean: Tensor
    corrupted: Tensor

    def batches(self) -> Iterator[_Batch]:
        denoise = self.direction == "denoise"
        for rows in torch.arange(len(self.prompts), device=self.full.device).split(int(self.batch_size)):
            pairs = self.prompts[rows]
            tokens, other = (pairs.corrupted, pairs.clean) if denoise else (pairs.clean, pairs.corrupted)
            source = capture_nodes(self.model, other, self.space.hooks)
            yield _Batch(pairs, rows.cpu(), tokens, source, self.full[rows], (self.corrupted if denoise else self.clean)[rows], self.metric)

    def effects(self, gates: dict[GateKey, Tensor], method: str, by_prompt: dict[GateKey, Tensor] | None = None) -> Effects:
        for key, gate in gates.items():
            check_finite(gate, f"the {key.granularity} effects of layer {key.layer}")
        clean, corrupted = float(self.clean.mean()), float(self.corrupted.mean())
        base = self.corrupted if self.direction == "denoise" else self.clean
        return Effects(gates, self.space, self.direction, method, clean, corrupted, len(self.prompts), by_prompt or {}, base.cpu())


def _task(model: Any, prompts: PromptPairs, granularities: str | Iterable[str] | None, direction: str, metric: LossFn, batch_size: int
          ) -> _Task:
    """Everything checked, and both runs measured."""
    if direction not in DIRECTIONS:
        raise ValueError(f"unknown direction {direction!r}; allowed: 'denoise' (clean activations into the corrupted run) and 'noise' "
                         "(corrupted activations into the clean run).")
    check_counts(batch_size=batch_size)
    nodes = find_nodes(model)
    names = [name for name in COARSE if name in nodes.granularities] if granularities is COARSE else granularities
    space = nodes.restrict(names)
    check_ready(model)
    prompts.check_fits(model)
    pairs = prompts.to(device_of(model))
    sliced = can_slice(model, pairs.clean, positions(pairs))
    full, other = (torch.cat([answer_logits(model, tokens(batch), positions(batch), sliced) for batch in pairs.batches(batch_size)])
                   for tokens in (lambda batch: batch.clean, lambda batch: batch.corrupted))
    clean, corrupted = (_measured(metric, logits, full, pairs) for logits in (full, other))
    _check_scale(float(clean.mean()), float(corrupted.mean()))
    return _Task(model, pairs, space, direction, metric, batch_size, sliced, full, clean, corrupted)


def _check_scale(clean: float, corrupted: float) -> None:
    if abs(clean - corrupted) <= 1e-6 * max(abs(clean), abs(corrupted)):
        raise ValueError(f"the metric is the same on the clean and on the corrupted prompts, {clean:.6g} on average: there is no "
                         "difference for a node to bring back, and nothing to normalise by. Are the corrupted prompts missing (copies "
                         "of the clean ones), or is the metric constant?")


def _measured(metric: LossFn, logits: Tensor, full: Tensor, prompts: PromptPairs) -> Float[Tensor, "batch"]:
    """A metric's values, checked. Raises ValueError where they are not [batch], FloatingPointError where they are not finite."""
    values = metric(logits, full, prompts)
    if not isinstance(values, Tensor) or values.shape != (len(prompts),):
        given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"the metric must return a tensor [batch], one value for each of the {len(prompts)} prompts; got {given}.")
    check_finite(values, "the metric")
    return values.float()


def _groups(space: NodeSpace, keys: Iterable[GateKey], size: int) -> Iterator[tuple[GateKey, Tensor]]:
    """Flat indices of the nodes of each gate tensor, at most `size` at a time."""
    for key in keys:
        for nodes in torch.arange(math.prod(space.shapes[key])).split(int(size)):
            yield key, nodes


def _patch(task: _Task, batch: _Batch, key: GateKey, nodes: Tensor) -> Float[Tensor, "node batch"]:
    """Gains when each of some nodes of a gate tensor is patched, all in one forward: a row per node and prompt."""
    n, source = len(nodes), batch.source[key.hook]
    mask = _one_closed(task.space, key, nodes).to(source.device).repeat_interleave(len(batch.prompts), 0)
    mask = mask.view(len(mask), 1, *(mask.shape[1:] or (1,)))
    repeated = source.repeat(n, *[1] * (source.ndim - 1))
    with temporary_hooks(task.model, mask_hooks([key.hook], lambda hook: mask, lambda hook: repeated)):
        logits = answer_logits(task.model, batch.tokens.repeat(n, 1), positions(batch.prompts).repeat(n), task.sliced,
                               of="the patched model")
    return torch.stack([batch.gain(part) for part in logits.split(len(batch.prompts))])


def _one_closed(space: NodeSpace, key: GateKey, nodes: Tensor) -> Float[Tensor, "node ..."]:
    """Masks at the hook's shape, each 0 at one node of a gate tensor (flat indices) and 1 elsewhere."""
    shape, width = space.shapes[key], space.width(key.hook)
    gates = torch.ones(len(nodes), math.prod(shape), dtype=torch.float32).scatter_(1, nodes[:, None], 0)
    return gates.view(-1, *shape, *[1] * (len(width) - len(shape))).expand(-1, *width)


def _heads_for_transformer_lens(model: Any, space: NodeSpace) -> list[GateKey]:
    """The head gates, by layer, where TransformerLens' patching takes this model: the same heads in every block, evaluation mode."""
    keys = [GateKey("head", layer) for layer in range(space.n_layers)]
    same = all(space.shapes.get(key) == (int(model.cfg.n_heads),) for key in keys)
    return keys if same and not model.training else []


def _patch_heads(task: _Task, batch: _Batch) -> Float[Tensor, "layer head batch"]:
    """Gains with each head patched, by TransformerLens itself, whose metric is a number: those of single prompts are kept as they come."""
    at, found = positions(batch.prompts), list[Tensor]()

    def metric(logits: Float[Tensor, "batch pos d_vocab"]) -> Tensor:
        found.append(batch.gain(logits[torch.arange(len(at), device=at.device), at].float()))
        return found[-1].sum()

    means = patching.get_act_patch_attn_head_out_all_pos(task.model, batch.tokens, batch.source, metric)
    return torch.stack(found).view(*means.shape, len(at))


def _slopes(task: _Task, batch: _Batch) -> dict[str, Tensor]:
    """First-order gains at each hook's shape: minus the gradient of a mask at 1, where the run is as it is."""
    hooks = task.space.hooks
    masks = {hook: torch.ones(task.space.width(hook), device=batch.full.device, requires_grad=True, dtype=torch.float32) for hook in hooks}
    with torch.enable_grad(), temporary_hooks(task.model, mask_hooks(hooks, masks.__getitem__, batch.source.__getitem__)):
        total = batch.gain(answer_logits(task.model, batch.tokens, positions(batch.prompts), task.sliced)).sum()
        if not total.requires_grad:
            raise ValueError("the metric has no gradient (a count or an argmax?); attribution patching needs a differentiable one.")
        grads = torch.autograd.grad(total, list(masks.values()), allow_unused=True)
    return {hook: torch.zeros_like(mask) if grad is None else -grad for (hook, mask), grad in zip(masks.items(), grads, strict=True)}
