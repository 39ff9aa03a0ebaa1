"""Nested training: one score per node, such that for every k the k nodes of highest score are a circuit.

Each prompt of a step gets a size k of its own, from the smallest to all, and the soft mask of that size, `m = sigmoid((score - tau_k) / T)`
with tau_k such that the mask sums to k (Matryoshka Attribution, arXiv:2609.25518). The loss' gradient goes through tau_k too. It is divided
by the root mean square that gradients have at about this size, since a small circuit's loss is a hundred times a large one's; so within a
size a prompt weighs as much as its loss is large. T falls from step to step, so that soft masks end near binary ones; the scores that come
out are the mean over the last half of the steps.

Two things make few steps enough. Sizes are drawn most often where the loss is about what was asked for; the loss at each size is known from
the steps before. And nodes learn together: the nodes of one head, or of one side of an MLP, share a score beside their own, whose gradient
is the sum of theirs and so far above the noise of single prompts.

Scores start from how much each node matters for any prompt: the root mean square over prompts of its integrated gradient. The mean
would call a node useless that helps one prompt and hurts another; removed, it is missed by both.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_nodeprune.masks import Landscape
from tl_nodeprune.nodes import NodeSpace
from tl_nodeprune.search.budget import Limits

PATH = (0.1, 0.3, 0.5, 0.7, 0.9)  # points of the integrated gradient between the ablated run and the full model
PATH_PROMPTS = 48
START_WIDTH, FARTHEST = 2.0, 3.0  # standard deviation of the scores at the start; how many of them a score may be from their mean
SMALLEST = 0.005  # share of the nodes
HOT, COLD = 1.0, 0.25  # temperature T at the first and the last step
RATE, LAST_RATE = 0.15, 0.03
MEMORY, SQUARES, DAMPING = 0.9, 0.999, 0.1  # Adam's; large DAMPING leaves loud nodes louder than quiet ones
SIZE_BINS, KEPT, LOUDEST = 24, 0.9, 3.0  # of what is known by size: bins, memory; a prompt's loudness over its bin's, at most
ELSEWHERE, NEAR = 0.1, 3.0  # how often sizes far from the one asked for are drawn; a factor in loss, or in size, that is near it
LIMITED_RATE = 2.0  # within limits: times the rate, for a plain gradient
AVERAGED = 0.5  # share of the steps at the end whose scores are averaged
BINS = 4096


class Nested:
    """The training of one order of all nodes. All that it changes is in `state`, so that a run can be saved and taken up again.

    near: a loss (float) or a number of nodes (int) about which sizes are drawn most often; None: all sizes alike, by their logarithm.
    limits: instead of nested sizes, the circuit that is best within limits of single granularities, as a binary mask.
    """

    def __init__(self, landscape: Landscape, *, steps: int, step_prompts: int, generator: torch.Generator, near: float | int | None = None,
                 limits: Limits | None = None) -> None:
        self.landscape, self.steps, self.near, self.limits, self.generator = landscape, steps, near, limits, generator
        self.batch = min(step_prompts, landscape.n_prompts)
        self.groups = groups(landscape.space).to(landscape.device)
        self.sizes = torch.bincount(self.groups).float()
        zeros, moments, bins = (torch.zeros(n, device=landscape.device, dtype=torch.float32)
                                for n in (landscape.n, landscape.n + len(self.sizes), SIZE_BINS))
        self.state = {"scores": zeros.clone(), "mean": zeros.clone(), "first": moments.clone(), "second": moments.clone(),  # groups last
                      "order": torch.empty(0, dtype=torch.long), "step": torch.zeros(2, dtype=torch.long),  # steps done, averaged
                      "power": bins.clone(), "losses": bins.clone(),  # by size: mean square of the gradients, mean loss
                      "lowest": torch.tensor(math.inf, device=landscape.device, dtype=torch.float32),
                      "trace": torch.zeros(steps, 3, device=landscape.device, dtype=torch.float32)}  # of each step: loss, size, temperature

    @property
    def done(self) -> int:
        """Steps done."""
        return int(self.state["step"][0])

    @property
    def scores(self) -> Float[Tensor, "node"]:
        """The order found so far, higher is better."""
        return self.state["mean"] if int(self.state["step"][1]) else self.state["scores"]

    def begin(self) -> None:
        """Set the scores to where the training starts from."""
        self.state["scores"] = effects(self.landscape, signed=self.limits is not None)

    def saved(self) -> dict[str, Tensor]:
        """The state, with that of learned constants, as tensors by name."""
        return self.state | self.landscape.constants_state()

    def load(self, saved: dict[str, Tensor]) -> None:
        """Go on from what `saved` gave."""
        self.state = {name: saved[name].to(value.device) for name, value in self.state.items()}
        self.landscape.load_constants(saved)

    def step(self, progress: float) -> None:
        """One step at a share of the training done, 0 to 1."""
        state, rows, temperature = self.state, self._rows(), HOT * (COLD / HOT) ** progress
        gates, window, bins = self._within(len(rows)) if self.limits else self._nested(len(rows), temperature)
        losses, grad = self.landscape.gradient(gates, rows, self.done)
        if not self.limits:  # tau_k moves with the scores, so that the size stays
            grad = window * (grad - (window * grad).sum(1, keepdim=True) / window.sum(1, keepdim=True).clamp(min=1e-9))
        self._note("losses", losses.loss, bins)
        grad = (grad / self._loudness(grad.pow(2).mean(1), bins)[:, None]).mean(0)
        rate = LAST_RATE + (RATE - LAST_RATE) * (1 + math.cos(math.pi * progress)) / 2
        if self.limits and losses.loss.mean() < state["lowest"]:  # within limits it is one circuit that is sought: the best that was met
            state["lowest"], state["mean"], state["step"][1] = losses.loss.mean(), state["scores"].clone(), 1
        state["scores"] -= rate * (LIMITED_RATE * grad if self.limits else self._move(grad))
        state["step"][0] += 1
        if progress >= AVERAGED and not self.limits:
            state["step"][1] += 1
            state["mean"] += (state["scores"] - state["mean"]) / int(state["step"][1])
        trace = [losses.loss.mean(), gates.sum(1).mean(), torch.tensor(temperature, device=grad.device, dtype=torch.float32)]
        state["trace"][self.done - 1] = torch.stack(trace)

    def _move(self, grad: Float[Tensor, "node"]) -> Float[Tensor, "node"]:
        """Adam's step for the nodes' own scores and those of their groups, together."""
        state, n, t = self.state, self.landscape.n, self.done + 1
        grad = torch.cat([grad, torch.zeros_like(self.sizes).index_add_(0, self.groups, grad) / self.sizes.sqrt()])
        state["first"].mul_(MEMORY).add_(grad, alpha=1 - MEMORY)
        state["second"].mul_(SQUARES).addcmul_(grad, grad, value=1 - SQUARES)
        move = state["first"] / (1 - MEMORY**t) / ((state["second"] / (1 - SQUARES**t)).sqrt() + DAMPING)
        return move[:n] + (move[n:] * (self.sizes > 1))[self.groups]

    def _note(self, name: str, values: Float[Tensor, "row"], bins: Int[Tensor, "row"]) -> Float[Tensor, "bin"]:
        """Keep the mean of what is seen at each size, the last steps most."""
        known = self.state[name]
        count, now = (torch.zeros_like(known).index_add_(0, bins, value) for value in (torch.ones_like(values), values))
        now = now / count.clamp(min=1)
        self.state[name] = torch.where(count > 0, torch.where(known > 0, KEPT * known + (1 - KEPT) * now, now), known)
        return self.state[name]

    def _loudness(self, squares: Float[Tensor, "row"], bins: Int[Tensor, "row"]) -> Float[Tensor, "row"]:
        """What each prompt's gradient is divided by: the root mean square of those at its size so far."""
        return torch.maximum(self._note("power", squares, bins)[bins], squares / LOUDEST**2).sqrt().clamp(min=1e-12)

    def _rows(self) -> Tensor:
        """The next prompts: all of them in a random order, then again in another."""
        if self.batch == self.landscape.n_prompts:
            return torch.arange(self.batch)
        order = self.state["order"]
        while len(order) < self.batch:
            order = torch.cat([order, torch.randperm(self.landscape.n_prompts, generator=self.generator)])
        self.state["order"] = order[self.batch:].clone()
        return order[: self.batch]

    def _nested(self, batch: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Soft masks [row node] of sizes spread by `_often`; how far each gate moves with its score, times T; the sizes' bins [row]."""
        n, device = self.landscape.n, self.landscape.device
        ends = torch.cat([torch.zeros(1, device=device, dtype=torch.float32), self._often().cumsum(0)])
        drawn = (torch.randperm(batch, generator=self.generator) + torch.rand(batch, generator=self.generator, dtype=torch.float32)) / batch
        drawn = drawn.to(device) * ends[-1]
        bins = (torch.searchsorted(ends, drawn, right=True) - 1).clamp(0, SIZE_BINS - 1)
        places = (bins + (drawn - ends[bins]) / (ends[bins + 1] - ends[bins])) / SIZE_BINS
        low = self._lowest()
        sizes = torch.exp(low + places * (math.log(n) - low)).clamp(max=n * (1 - 1e-4))
        scores = self.state["scores"]
        masks = torch.sigmoid((scores - thresholds(scores, sizes, temperature)[:, None]) / temperature)
        return masks, masks * (1 - masks), bins

    def _lowest(self) -> float:
        """The logarithm of the smallest size."""
        return math.log(max(SMALLEST * self.landscape.n, 1))

    def _often(self) -> Float[Tensor, "bin"]:
        """How often sizes of each bin are drawn: once where they are near what is asked for, ELSEWHERE times far from it."""
        known, low = self.state["losses"], self._lowest()
        if self.near is None:
            return torch.ones_like(known)
        middles = low + (torch.arange(SIZE_BINS, device=known.device) + 0.5) / SIZE_BINS * (math.log(self.landscape.n) - low)
        off = (known.log() if isinstance(self.near, float) else middles) - math.log(self.near)
        often = ELSEWHERE + (1 - ELSEWHERE) / (1 + (off / math.log(NEAR)) ** 4)
        return torch.where((known > 0).all(), often, torch.ones_like(known))

    def _within(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        assert self.limits is not None
        kept = self.limits.best(self.state["scores"].cpu()).float().to(self.landscape.device)
        return kept.expand(batch, -1), kept, torch.zeros(batch, dtype=torch.long, device=self.landscape.device)


def groups(space: NodeSpace) -> Int[Tensor, "node"]:
    """Which group each node is in: a head's dims, a layer's neurons, an MLP's output dims; a coarser node is one of its own."""
    parts, n = list[Tensor](), 0
    for key in space.free():
        shape = space.shapes[key]
        together = key.granularity in ("attn_neuron", "mlp_neuron", "mlp_out")
        own = torch.arange(math.prod(shape[:-1] if together else shape))
        parts.append(n + own.repeat_interleave(shape[-1] if together else 1))
        n += len(own)
    return torch.cat(parts)


def thresholds(scores: Float[Tensor, "node"], sizes: Float[Tensor, "size"], temperature: float) -> Float[Tensor, "size"]:
    """tau such that `sigmoid((scores - tau) / temperature)` sums to each size: by bisection, over a histogram of many scores."""
    low, high = scores.min(), scores.max()
    if len(scores) > 2 * BINS:
        place = ((scores - low) / (high - low).clamp(min=1e-12) * (BINS - 1)).round().long()
        counts = torch.zeros(BINS, device=scores.device).index_add_(0, place, torch.ones_like(scores))
        values = low + (high - low) * torch.arange(BINS, device=scores.device) / (BINS - 1)
    else:
        counts, values = torch.ones_like(scores), scores
    below, above = (end.expand(len(sizes)) for end in (low - 20 * temperature, high + 20 * temperature))
    for _ in range(40):
        middle = (below + above) / 2
        large = torch.sigmoid((values - middle[:, None]) / temperature) @ counts > sizes
        below, above = torch.where(large, middle, below), torch.where(large, above, middle)
    return (below + above) / 2


def effects(landscape: Landscape, *, signed: bool = False) -> Float[Tensor, "node"]:
    """Where scores start: the logarithm of the root mean square over prompts of each node's integrated gradient, standardised.
    signed: instead the mean, what helps above 0, over its root mean square over nodes."""
    rows = torch.arange(landscape.n_prompts)
    rows = rows[torch.linspace(0, len(rows) - 1, min(PATH_PROMPTS, len(rows)), dtype=torch.float32).long()]
    squares = mean = torch.zeros(landscape.n, device=landscape.device, dtype=torch.float32)
    for chunk in rows.split(min(landscape.reference.batch_size, 16)):
        points = [landscape.gradient(torch.full((len(chunk), landscape.n), point, dtype=torch.float32), chunk, step=0)[1] for point in PATH]
        found = torch.stack(points).mean(0)
        squares, mean = squares + found.pow(2).sum(0), mean - found.sum(0)
    if signed:
        return mean / mean.pow(2).mean().sqrt().clamp(min=1e-30)
    logs = (squares / len(rows)).sqrt().clamp(min=1e-9 * float(squares.max().sqrt()) + 1e-30).log()
    spread = logs.std(correction=0)
    return START_WIDTH * ((logs - logs.mean()) / spread.clamp(min=1e-6)).clamp(-FARTHEST, FARTHEST)
