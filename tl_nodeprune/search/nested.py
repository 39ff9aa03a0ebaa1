"""Nested training: one score per node, such that for every k the k nodes of highest score are a circuit.

Each prompt of a step gets a size k of its own, from the smallest to all, and the soft mask of that size, `m = sigmoid((score - tau_k) / T)`
with tau_k such that the mask sums to k (Matryoshka Attribution, arXiv:2609.25518). The loss' gradient goes through tau_k too. It is divided
by the root mean square that gradients have at about this size, since a small circuit's loss is a hundred times a large one's; so within a
size a prompt weighs as much as its loss is large. T falls from step to step, so that soft masks end near binary ones; the scores that come
out are the mean over the last half of the steps.

Scores start from how much each node matters for any prompt: the root mean square over prompts of its integrated gradient. The mean
would call a node useless that helps one prompt and hurts another; removed, it is missed by both.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_nodeprune.search.budget import Limits
from tl_nodeprune.search.landscape import Landscape

PATH = (0.1, 0.3, 0.5, 0.7, 0.9)  # points of the integrated gradient between the ablated run and the full model
PATH_PROMPTS = 48
START_WIDTH, FARTHEST = 2.0, 3.0  # standard deviation of the scores at the start; how many of them a score may be from their mean
SMALLEST = 0.005  # share of the nodes
HOT, COLD = 0.5, 0.1  # temperature T at the first and the last step
RATE, LAST_RATE = 0.3, 0.05
MEMORY, SQUARES, DAMPING = 0.9, 0.999, 0.3  # Adam's; large DAMPING leaves loud nodes louder than quiet ones
SIZE_BINS, KEPT, LOUDEST = 12, 0.9, 3.0  # of gradients' squares: bins of sizes, memory; a prompt's loudness over its bin's, at most
AVERAGED = 0.5  # share of the steps at the end whose scores are averaged
BINS = 4096


class Nested:
    """The training of one order of all nodes. All that it changes is in `state`, so that a run can be saved and taken up again.

    limits: instead of nested sizes, the circuit that is best within limits of single granularities, as a binary mask.
    """

    def __init__(self, landscape: Landscape, *, steps: int, step_prompts: int, generator: torch.Generator,
                 limits: Limits | None = None) -> None:
        self.landscape, self.steps, self.limits, self.generator = landscape, steps, limits, generator
        self.batch = min(step_prompts, landscape.n_prompts)
        zeros = torch.zeros(landscape.n, device=landscape.device)
        self.state = {"scores": zeros.clone(), "mean": zeros.clone(), "first": zeros.clone(), "second": zeros.clone(),
                      "order": torch.empty(0, dtype=torch.long), "step": torch.zeros(2, dtype=torch.long),  # steps done, averaged
                      "power": torch.zeros(SIZE_BINS, device=landscape.device),  # mean square of the gradients, by size
                      "lowest": torch.tensor(math.inf, device=landscape.device),
                      "trace": torch.zeros(steps, 3, device=landscape.device)}  # of each step: loss, size, temperature

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
        grad = (grad / self._loudness(grad.pow(2).mean(1), bins)[:, None]).mean(0)
        t = self.done + 1
        state["first"].mul_(MEMORY).add_(grad, alpha=1 - MEMORY)
        state["second"].mul_(SQUARES).addcmul_(grad, grad, value=1 - SQUARES)
        scale = (state["second"] / (1 - SQUARES**t)).sqrt() + DAMPING
        rate = LAST_RATE + (RATE - LAST_RATE) * (1 + math.cos(math.pi * progress)) / 2
        if self.limits and losses.loss.mean() < state["lowest"]:  # within limits it is one circuit that is sought: the best that was met
            state["lowest"], state["mean"], state["step"][1] = losses.loss.mean(), state["scores"].clone(), 1
        state["scores"] -= rate * grad if self.limits else rate / (1 - MEMORY**t) * state["first"] / scale
        state["step"][0] += 1
        if progress >= AVERAGED and not self.limits:
            state["step"][1] += 1
            state["mean"] += (state["scores"] - state["mean"]) / int(state["step"][1])
        state["trace"][t - 1] = torch.stack([losses.loss.mean(), gates.sum(1).mean(), torch.tensor(temperature, device=grad.device)])

    def _loudness(self, squares: Float[Tensor, "row"], bins: Int[Tensor, "row"]) -> Float[Tensor, "row"]:
        """What each prompt's gradient is divided by: the root mean square of those at its size so far."""
        power = self.state["power"]
        count, now = (torch.zeros_like(power).index_add_(0, bins, value) for value in (torch.ones_like(squares), squares))
        now = now / count.clamp(min=1)
        kept = torch.where(power > 0, KEPT * power + (1 - KEPT) * now, now)
        self.state["power"] = torch.where(count > 0, kept, power)
        return torch.maximum(self.state["power"][bins], squares / LOUDEST**2).sqrt().clamp(min=1e-12)

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
        """Soft masks [row node] of sizes spread log-uniformly; how far each gate moves with its score, times T; the sizes' bins [row]."""
        n = self.landscape.n
        low = math.log(max(SMALLEST * n, 1))
        places = (torch.randperm(batch, generator=self.generator) + torch.rand(batch, generator=self.generator)) / batch
        sizes = torch.exp(low + places * (math.log(n) - low)).clamp(max=n * (1 - 1e-4)).to(self.landscape.device)
        scores = self.state["scores"]
        masks = torch.sigmoid((scores - thresholds(scores, sizes, temperature)[:, None]) / temperature)
        return masks, masks * (1 - masks), (places * SIZE_BINS).long().clamp(max=SIZE_BINS - 1).to(self.landscape.device)

    def _within(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        assert self.limits is not None
        kept = self.limits.best(self.state["scores"].cpu()).float().to(self.landscape.device)
        return kept.expand(batch, -1), kept, torch.zeros(batch, dtype=torch.long, device=self.landscape.device)


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
    rows = rows[torch.linspace(0, len(rows) - 1, min(PATH_PROMPTS, len(rows))).long()]
    squares, mean = torch.zeros(landscape.n, device=landscape.device), torch.zeros(landscape.n, device=landscape.device)
    for chunk in rows.split(min(landscape.reference.batch_size, 16)):
        points = [landscape.gradient(torch.full((len(chunk), landscape.n), point), chunk, step=0)[1] for point in PATH]
        found = torch.stack(points).mean(0)
        squares, mean = squares + found.pow(2).sum(0), mean - found.sum(0)
    if signed:
        return mean / mean.pow(2).mean().sqrt().clamp(min=1e-30)
    logs = (squares / len(rows)).sqrt().clamp(min=1e-9 * float(squares.max().sqrt()) + 1e-30).log()
    spread = logs.std(correction=0)
    return START_WIDTH * ((logs - logs.mean()) / spread.clamp(min=1e-6)).clamp(-FARTHEST, FARTHEST)
