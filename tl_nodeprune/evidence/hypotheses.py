"""The circuit-hypothesis tests of Shi et al. 2024 (arXiv:2410.13032), in our reading: equivalence, independence, minimality.

Each takes scores that were measured before (`tl_nodeprune.report` measures them) and raises ValueError where they are too few to tell
anything, FloatingPointError where one is NaN or inf. The null of the first two is what a circuit claims, so that a small p-value speaks
against it and a large one is no proof for it; the null of the third is what a circuit denies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import count

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

from tl_nodeprune.nodes import Figured, check_counts, check_finite, check_level, check_seed, check_types, figures

__all__ = ["FEWEST", "HypothesisTest", "equivalence", "independence", "minimality"]

FEWEST = 20
"""Prompts that equivalence and independence need: they are passed by not being rejected, which with fewer says nothing."""


@dataclass(frozen=True, repr=False)
class HypothesisTest(Figured):
    """A test's outcome. statistic, p_value: as in the docstring of the function that made it, NaN where the test could not be made;
    passed: whether it speaks for the circuit, None where not made; sentence: what this means, in words."""

    name: str
    statistic: float
    p_value: float
    passed: bool | None
    sentence: str

    @classmethod
    def not_made(cls, name: str, why: str) -> HypothesisTest:
        return cls(name, math.nan, math.nan, None, f"Not tested: {why}")


def equivalence(circuit: Float[Tensor, "prompt"], full: Float[Tensor, "prompt"], *, tolerance: float = 0.1, alpha: float = 0.05,
                ties: float = 0.0) -> HypothesisTest:
    """Is either of circuit and full model more likely to score higher on a prompt?

    statistic = `|w / n - 1/2|`, w the number of prompts on which the circuit scores higher, those within `ties` of each other counted
    half. Null: `|P(the circuit scores higher) - 1/2| <= tolerance`. p-value: the chance of a statistic at least as large where that
    probability is 1/2 + tolerance, the worst case under the null (two-sided sign test, binomial). Passed where the null is not rejected.
    circuit, full: scores (logit differences) on prompts that the circuit was not searched on.

    Source: arXiv:2410.13032, equivalence, in our reading. Raises: ValueError for fewer than 20 prompts, or so few that no outcome could be
    rejected; scores of unequal number; a tolerance outside of [0, 0.4]; FloatingPointError for NaN or inf.
    """
    check_types(equivalence, locals())
    check_level(alpha=alpha)
    if not 0 <= ties < math.inf:
        raise ValueError(f"ties={ties}; it must be a finite number, 0 or more (logits).")
    if not 0 <= tolerance <= 0.4:
        raise ValueError(f"tolerance={tolerance}; it must lie between 0 and 0.4 (a chance of 1/2 give or take that much).")
    n, gaps = _pairs(circuit, full, "equivalence", "circuit, full"), _array(circuit, "circuit") - _array(full, "full")
    wins = float((gaps > ties).sum() + (abs(gaps) <= ties).sum() / 2)
    if _sign_p(n / 2, n, tolerance) > alpha:
        needed = next(m for m in count(n) if _sign_p(m / 2, m, tolerance) <= alpha)
        raise ValueError(f"equivalence at alpha={alpha:g} with tolerance={tolerance:g} needs {needed} prompts or more; got {n}.")
    p_value = _sign_p(abs(wins - n / 2), n, tolerance)
    told = next(k / n for k in range(math.ceil(n / 2), n + 1) if _sign_p(k - n / 2, n, tolerance) <= alpha)
    share = f"The circuit scores higher than the full model on {wins / n:.0%} of {n} prompts"
    if passed := p_value > alpha:
        sentence = (f"{share}: compatible with equal chances, give or take {tolerance:g} (p = {figures(p_value)}). No proof of equality: "
                    f"with so many prompts only shares of {told:.0%} and above, or {1 - told:.0%} and below, would have been told apart.")
    else:
        sentence = f"{share}: further from equal chances than {tolerance:g} (p = {figures(p_value)}), so the two are not equivalent."
    return HypothesisTest("equivalence", abs(wins / n - 0.5), p_value, passed, sentence)


def independence(complement: Float[Tensor, "prompt"], full: Float[Tensor, "prompt"], *, alpha: float = 0.05, permutations: int = 999,
                 seed: int = 0) -> HypothesisTest:
    """With the circuit knocked out, does the model's score still go with what the full model scores?

    statistic = HSIC, `tr(K H L H) / n**2`, with Gaussian kernels K, L of the two scores, bandwidths the median distances (Gretton et al.
    2005, the biased estimate), H = 1 - 1/n. Null: the scores of the complement and of the full model are independent over prompts.
    p-value: permutation test, the share of random pairings with a statistic at least as large. Passed where the null is not rejected.
    complement, full: scores (logit differences) of the model without the circuit and of the full model.

    Source: arXiv:2410.13032, independence, in our reading. Raises: ValueError for fewer than 20 prompts, scores of unequal number, or
    scores that are the same on all prompts; FloatingPointError for NaN or inf.
    """
    check_types(independence, locals())
    check_level(alpha=alpha)
    check_counts(permutations=permutations)
    check_seed(seed)
    n = _pairs(complement, full, "independence", "complement, full")
    left, right = (_kernel(_array(values, name), name) for values, name in ((complement, "complement"), (full, "full")))
    center = np.eye(n) - 1 / n
    centred = center @ left @ center / n**2

    def hsic(order: NDArray[np.int64]) -> float:
        return float((centred * right[np.ix_(order, order)]).sum())

    found = stats.permutation_test((np.arange(n),), hsic, permutation_type="pairings", alternative="greater", vectorized=False,
                                   n_resamples=permutations, random_state=np.random.default_rng(seed))
    p_value, statistic = float(found.pvalue), float(found.statistic)
    if passed := p_value > alpha:
        sentence = (f"No dependence was found between the scores of the model without the circuit and of the full model on {n} prompts "
                    f"(HSIC, p = {figures(p_value)}). A weak dependence may go unseen.")
    else:
        sentence = (f"On {n} prompts the model without the circuit still scores in a way that depends on the full model's score "
                    f"(HSIC, p = {figures(p_value)}): something outside of the circuit takes part, or prompts differ in "
                    "what both respond to.")
    return HypothesisTest("independence", statistic, p_value, passed, sentence)


def minimality(effects: Float[Tensor, "unit"], reference: Float[Tensor, "draw"], *, quantile: float = 0.9, alpha: float = 0.05,
               names: list[str] | None = None) -> tuple[HypothesisTest, Float[NDArray[np.float64], "unit"]]:
    """Does every unit of the circuit matter more than a unit at random?

    effects: the change of score by removing each unit from the circuit, mean over prompts of its absolute value. reference: the same for
    units at random, each one of a random path that was added to the circuit first. A unit's statistic is the number of draws with a smaller
    effect than its own. Its null: at most the share `quantile` of random units have a smaller effect; its p-value is binomial, one-sided,
    and times the number of units (Bonferroni). Passed where the null is rejected for every unit.

    Returns the test (statistic: the number of units for which the null stands; p-value: the largest) and the p-value of each unit.
    Source: arXiv:2410.13032, minimality, in our reading. Raises: ValueError for no unit, or too few draws for any p-value to be small;
    FloatingPointError for NaN or inf.
    """
    check_types(minimality, locals())
    check_level(alpha=alpha, quantile=quantile)
    for name, given in (("effects", effects), ("reference", reference)):
        if given.ndim != 1:
            raise ValueError(f"{name} must be one number each, [n]; got {tuple(given.shape)}.")
    values, drawn = _array(effects, "effects"), _array(reference, "reference")
    if not len(values):
        raise ValueError("minimality needs one unit or more in effects; the circuit keeps none.")
    if names is not None and len(names) != len(values):
        raise ValueError(f"names has {len(names)} names, but effects are of {len(values)} units.")
    needed = math.ceil(math.log(alpha / len(values)) / math.log(quantile))
    if len(drawn) < needed:
        raise ValueError(f"minimality of {len(values)} units at alpha={alpha:g} needs {needed} random units or more; got {len(drawn)} in "
                         "reference.")
    below = (drawn[None] < values[:, None]).sum(1)
    raw = [stats.binomtest(int(k), len(drawn), quantile, alternative="greater").pvalue for k in below]
    p_values = np.minimum(1, np.array(raw) * len(values))
    failing = [(names or [str(i) for i in range(len(values))])[i] for i in np.argsort(values) if p_values[i] > alpha]
    of = f"more than {quantile:.0%} of {len(drawn)} random ones"
    if not failing:
        sentence = (f"Each of the {len(values)} units tried matters {of} (largest p = {figures(p_values.max())}, corrected for "
                    "their number).")
    else:
        more = f" and {len(failing) - 8} more" if len(failing) > 8 else ""
        sentence = (f"{len(failing)} of {len(values)} units tried could not be shown to matter {of}: {', '.join(failing[:8])}{more} "
                    f"(p up to {figures(p_values.max())}, corrected for their number).")
    return HypothesisTest("minimality", float(len(failing)), float(p_values.max()), not failing, sentence), p_values


def _sign_p(distance: float, n: int, tolerance: float) -> float:
    """P(|X - n/2| >= distance) for X ~ Binomial(n, 1/2 + tolerance)."""
    share = 0.5 + tolerance
    above, below = math.ceil(n / 2 + distance - 1e-9), math.floor(n / 2 - distance + 1e-9)
    return min(1.0, float(stats.binom.sf(above - 1, n, share) + stats.binom.cdf(below, n, share)))


def _kernel(values: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    distances = pdist(values[:, None])
    if not distances.max() > 1e-6 * max(1.0, float(abs(values).max())):
        raise ValueError(f"independence needs scores that differ between prompts; those of {name} are {figures(values[0])} on all of them.")
    width = float(np.median(distances)) or float(distances[distances > 0].mean())
    kernel: NDArray[np.float64] = np.exp(-(squareform(distances) ** 2) / (2 * width**2))
    return kernel


def _pairs(one: Tensor, other: Tensor, name: str, sides: str) -> int:
    """How many prompts. Raises ValueError where these are too few, or unlike in number."""
    if one.ndim != 1 or one.shape != other.shape:
        raise ValueError(f"{name} needs one score per prompt from both; got {tuple(one.shape)} and {tuple(other.shape)} in {sides}.")
    if len(one) < FEWEST:
        raise ValueError(f"{name} needs {FEWEST} prompts or more; got {len(one)}.")
    return len(one)


def _array(values: Tensor, name: str) -> NDArray[np.float64]:
    """As doubles. Raises FloatingPointError for NaN or inf, of which no comparison is true."""
    check_finite(values, f"the scores of {name}")
    return values.detach().double().cpu().numpy()
