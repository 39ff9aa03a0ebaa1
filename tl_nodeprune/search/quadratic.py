"""The loss near a circuit as a quadratic of its gates, and moves planned on it in blocks."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_nodeprune.losses import check_finite, choice_hinge, kl_divergence
from tl_nodeprune.prompts import PromptPairs
from tl_nodeprune.search.landscape import HINGE_WEIGHT, Landscape

BLOCKS = 8  # a plan is made of so many blocks of moves, each planned at the circuit that the one before leaves
GAIN = 1e-4  # share of the loss that a block must be foretold to bring


class Quadratic:
    """`loss + slope . d + |rows d|^2 / 2` for changes d [c] of gates from where they are; flipping gates updates it in place.

    nodes: [c] indices into the flat gates. kept: [c] bool, now. rows: [curvature c].
    """

    def __init__(self, nodes: Int[Tensor, "c"], kept: Bool[Tensor, "c"], slope: Float[Tensor, "c"], rows: Float[Tensor, "curvature c"],
                 loss: float) -> None:
        self.nodes, self.kept, self.rows, self.loss = nodes, kept.clone(), rows, loss
        self._slope, self._curvature = slope.clone(), rows.pow(2).sum(0)

    def costs(self) -> Float[Tensor, "c"]:
        """What flipping each gate, one alone, would add to the loss."""
        return torch.where(self.kept, -self._slope, self._slope) + self._curvature / 2

    def cost_of_closing(self, together: Tensor) -> Tensor:
        """What closing several kept gates at once would add to the loss."""
        return self.rows[:, together].sum(1).pow(2).sum() / 2 - self._slope[together].sum()

    def flip(self, which: Int[Tensor, "m"]) -> float:
        """Flip gates together; what that adds to the loss."""
        steps = torch.where(self.kept[which], -1.0, 1.0).to(self._slope)
        move = self.rows[:, which] @ steps
        added = float(self._slope[which] @ steps + move.pow(2).sum() / 2)
        self._slope += self.rows.T @ move
        self.kept[which] = ~self.kept[which]
        self.loss += added
        return added

    def exchanges(self, most: int) -> Int[Tensor, "pair 2"]:
        """Up to `most` pairs, a closed gate to open and a kept one to close, that lower the loss as foretold, in order."""
        taken, block = [torch.empty(0, 2, dtype=torch.long, device=self.kept.device)], max(most // BLOCKS, 1)
        used = torch.zeros_like(self.kept)
        while block and sum(map(len, taken)) < most:
            costs = self.costs().masked_fill(used, torch.inf)
            size = min(block, int((~self.kept & ~used).sum()), int((self.kept & ~used).sum()))
            opened, closed = (costs.masked_fill(off, torch.inf).topk(size, largest=False).indices for off in (self.kept, ~self.kept))
            pairs = torch.stack([opened, closed], 1)[costs[opened] + costs[closed] < 0]
            if len(pairs) and self.flip(pairs.flatten()) < -GAIN * abs(self.loss):
                taken.append(pairs)
                used[pairs.flatten()] = True
                continue
            if len(pairs):
                self.flip(pairs.flatten())
            block //= 2
        return torch.cat(taken)

    def removals(self, limit: float, most: int) -> Int[Tensor, "m"]:
        """Up to `most` kept gates to close, the cheapest first, while the loss is foretold to stay at the limit or below."""
        taken, block = [torch.empty(0, dtype=torch.long, device=self.kept.device)], max(most // BLOCKS, 1)
        while block and sum(map(len, taken)) < most:
            costs = self.costs().masked_fill(~self.kept, torch.inf)
            cheapest = costs.topk(min(block, int(self.kept.sum())), largest=False).indices
            if len(cheapest):
                self.flip(cheapest)
                if self.loss <= limit:
                    taken.append(cheapest)
                    continue
                self.flip(cheapest)
            block //= 2
        return torch.cat(taken)


def quadratic(landscape: Landscape, kept: Bool[Tensor, "node"], rows: Int[Tensor, "row"], nodes: Int[Tensor, "c"],
              generator: torch.Generator) -> Quadratic:
    """The KL + hinge near a binary circuit as a quadratic of the gates of `nodes` (Gauss-Newton).

    Every prompt has gates of its own here, so one backward pass per curvature direction gives all prompts' rows at once.
    """
    slope, curves, losses = torch.zeros(len(nodes), device=landscape.device), [], []
    for chunk in landscape.reference.chunks(rows):
        prompts, full = landscape.reference.prompts[chunk], landscape.reference.full[chunk.to(landscape.reference.full.device)]
        flat = kept.float().to(full.device).expand(len(chunk), -1).clone().requires_grad_(True)
        with torch.enable_grad():
            logits = landscape.logits(flat, chunk)
        check_finite(logits, "the circuit")
        wanted, hinge_slope = _logit_gradients(logits.detach(), full, prompts)
        losses.append(kl_divergence(logits.detach(), full))
        directions = [wanted, *fisher_probes(logits.detach(), generator), HINGE_WEIGHT**0.5 * hinge_slope]
        rows_of = [torch.autograd.grad(logits, flat, v, retain_graph=v is not directions[-1])[0][:, nodes] for v in directions]
        landscape.passed((1 + 2 * len(directions)) * len(chunk))
        slope += rows_of[0].sum(0) / len(rows)
        curves += [row / len(rows) ** 0.5 for row in rows_of[1:]]
    return Quadratic(nodes, kept[nodes], slope, torch.cat(curves), float(torch.cat(losses).mean()))


def fisher_probes(logits: Float[Tensor, "batch d_vocab"], generator: torch.Generator | None = None, *, exact: int = 6,
                  random: int = 2) -> list[Tensor]:
    """Directions v in logit space [batch d_vocab] with `sum v v^T ~ diag(q) - q q^T`, the Hessian of KL(p || q) in the logits of q.

    The `exact` likeliest tokens have `sqrt(q_i) (e_i - q)` each, all others together `random` unbiased draws of random signs.
    """
    q = logits.softmax(-1)
    top = q.topk(min(exact, q.shape[-1]), dim=-1).indices
    basis = [torch.zeros_like(q).scatter_(1, i[:, None], q.gather(1, i[:, None]).sqrt()) for i in top.T]
    rest = q.scatter(1, top, 0.0).sqrt() / random**0.5
    signs = (torch.randint(0, 2, q.shape, generator=generator).to(q) * 2 - 1 for _ in range(random))
    return [w - q * (w.sum(-1, keepdim=True)) for w in (*basis, *(rest * sign for sign in signs))]


def _logit_gradients(logits: Tensor, full: Tensor, prompts: PromptPairs) -> tuple[Tensor, Tensor]:
    """Gradients to the logits [batch d_vocab]: of the KL + hinge, and of the logit difference where the hinge is near its kink."""
    leaf = logits.clone().requires_grad_(True)
    with torch.enable_grad():
        hinge = choice_hinge(leaf, full, prompts)
        (wanted,) = torch.autograd.grad((kl_divergence(leaf, full) + HINGE_WEIGHT * hinge).sum(), leaf)
        (slope,) = torch.autograd.grad(prompts.logit_diff(leaf).sum(), leaf)
    return wanted, slope * ((hinge > 0) & (hinge < 1)).unsqueeze(1)
