"""The tests of Shi et al.: closed forms, known answers with negative controls, and what they ask for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from tl_nodeprune.evidence.hypotheses import FEWEST, HypothesisTest, equivalence, independence, minimality


def normal(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("wins", "n"), [(10, 20), (14, 20), (17, 20), (2, 20), (25, 31)])
def test_equivalence_is_the_two_sided_sign_test_with_a_tolerance(wins: int, n: int) -> None:
    full = torch.zeros(n)
    gaps = torch.where(torch.arange(n) < wins, 1.0, -1.0)
    found = equivalence(gaps, full)
    away = abs(wins - n / 2)
    by_hand = sum(math.comb(n, k) * 0.6**k * 0.4 ** (n - k) for k in range(n + 1) if abs(k - n / 2) >= away)
    assert found.p_value == pytest.approx(by_hand) and found.statistic == pytest.approx(away / n)
    assert found.passed == (by_hand > 0.05) and f"{wins / n:.0%} of {n} prompts" in found.sentence
    assert equivalence(-gaps, full).p_value == pytest.approx(by_hand)


def test_without_a_tolerance_it_is_scipys_binomial_test() -> None:
    gaps = torch.where(torch.arange(30) < 20, 1.0, -1.0)
    assert equivalence(gaps, gaps * 0, tolerance=0).p_value == pytest.approx(stats.binomtest(20, 30).pvalue)


def test_equal_scores_are_ties_and_pass_slightly_lower_ones_do_not() -> None:
    full = normal(40)
    rounding = 1e-5 * normal(40, 1).abs()
    assert equivalence(full - rounding, full, ties=1e-3).passed and equivalence(full, full).p_value == 1
    assert not equivalence(full - rounding, full).passed


def test_equivalence_says_what_it_could_have_told_and_claims_no_more() -> None:
    sentence = equivalence(normal(20), normal(20) * 0).sentence
    assert "No proof of equality" in sentence and "shares of 85% and above, or 15% and below" in sentence


def test_equivalence_keeps_its_level_in_the_worst_case() -> None:
    generator = torch.Generator().manual_seed(0)
    rejected = [not equivalence((torch.rand(40, generator=generator) < 0.6).float() - 0.5, torch.zeros(40)).passed for _ in range(400)]
    assert np.mean(rejected) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 400)


def test_independence_finds_dependence_also_where_there_is_no_correlation() -> None:
    x = normal(60)
    for other in (x, -x, x**2, (3 * x).cos()):
        found = independence(other + 0.1 * normal(60, 1), x)
        assert found.passed is False and found.p_value < 0.01 and "still scores in a way that depends" in found.sentence
    assert independence(normal(60, 2), x).passed


def test_independence_keeps_its_level_and_is_the_same_with_the_same_seed() -> None:
    p = [independence(normal(24, seed), normal(24, seed + 1000), permutations=99).p_value for seed in range(200)]
    assert 0.01 <= np.mean(np.array(p) <= 0.05) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 200)
    one, again = (independence(normal(24), normal(24, 3), seed=5) for _ in range(2))
    assert one == again


def test_hsic_by_hand() -> None:
    x, y = normal(20).double(), normal(20, 1).double()
    center = torch.eye(20, dtype=torch.float64) - 1 / 20
    kernels = []
    for values in (x, y):
        apart = (values[:, None] - values[None]).abs()
        width = np.median(apart[np.triu_indices(20, 1)])
        kernels.append((-(apart**2) / (2 * width**2)).exp())
    by_hand = (kernels[0] @ center @ kernels[1] @ center).trace() / 20**2
    assert independence(x, y).statistic == pytest.approx(float(by_hand))


def test_minimality_is_binomial_and_names_what_is_no_better_than_random() -> None:
    reference = torch.arange(100) / 100
    found, p_values = minimality(torch.tensor([2.0, 0.955, 0.5]), reference, names=["head 0.1", "head 0.2", "MLP 1"])
    by_hand = [3 * stats.binom.sf(k - 1, 100, 0.9) for k in (100, 96, 50)]
    assert p_values == pytest.approx(np.minimum(by_hand, 1)) and found.p_value == p_values.max()
    assert not found.passed and found.statistic == 2 and "2 of 3 units" in found.sentence and "MLP 1, head 0.2 (p" in found.sentence
    better, _ = minimality(torch.tensor([2.0, 3.0]), reference)
    assert better.passed and better.statistic == 0 and "Each of the 2 units" in better.sentence


def test_a_random_unit_rarely_passes_minimality() -> None:
    passed = [minimality(normal(1, seed), normal(100, seed + 999))[0].passed for seed in range(300)]
    assert np.mean(passed) < 0.1


def test_too_few_says_how_many() -> None:
    for test in (equivalence, independence):
        with pytest.raises(ValueError, match=f"needs {FEWEST} prompts or more; got 19"):
            test(normal(19), normal(19))
        with pytest.raises(ValueError, match=r"one score per prompt from both; got \(20,\) and \(21,\)"):
            test(normal(20), normal(21))
        test(normal(20), normal(20, 1))
    with pytest.raises(ValueError, match="minimality of 8 units at alpha=0.05 needs 49 random units or more; got 48"):
        minimality(normal(8), normal(48))
    assert minimality(normal(8).abs() + 9, normal(49))[0].passed, "as many as it says are enough"
    with pytest.raises(ValueError, match="the circuit keeps none"):
        minimality(normal(0), normal(100))


def test_a_tolerance_that_allows_anything_is_refused() -> None:
    with pytest.raises(ValueError, match="tolerance=0.5; it must lie between 0 and 0.4"):
        equivalence(normal(20), normal(20), tolerance=0.5)
    with pytest.raises(ValueError, match="alpha=0.05 with tolerance=0.4 needs 29 prompts or more; got 20"):
        equivalence(normal(20), normal(20, 1), tolerance=0.4)
    assert 0.9**29 <= 0.05 < 0.9**28 and "shares of 100% and above" in equivalence(normal(29), normal(29, 1), tolerance=0.4).sentence


def test_constant_scores_are_named() -> None:
    with pytest.raises(ValueError, match="scores that differ between prompts; those of full are 2 on all"):
        independence(normal(20), torch.full((20,), 2.0))
    with pytest.raises(ValueError, match="those of complement are 0 on all"):
        independence(torch.zeros(20), normal(20))


def test_not_made_is_nan_and_says_why() -> None:
    found = HypothesisTest.not_made("equivalence", "too few.")
    assert math.isnan(found.p_value) and found.passed is None and found.sentence == "Not tested: too few."


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_broken_score_is_an_error_not_a_loss(value: float) -> None:
    broken = normal(30)
    broken[4] = value
    for call in (lambda: equivalence(broken, normal(30)), lambda: equivalence(normal(30), broken),
                 lambda: independence(broken, normal(30)), lambda: minimality(broken, normal(200).abs()),
                 lambda: minimality(normal(3), broken.repeat(10))):
        with pytest.raises(FloatingPointError, match="NaN or inf in the scores"):
            call()
