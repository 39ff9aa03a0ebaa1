"""Closed-form values of gates and of the mix."""

from __future__ import annotations

import math

import pytest
import torch

from tl_nodeprune import HardConcrete, StepGate
from tl_nodeprune.nodes.hooks import Mix, mix

GATE = HardConcrete()


@pytest.mark.parametrize(("score", "mask"), [
    (0.0, 0.5), (3.0, 1.0), (-3.0, 0.0), (2.5, 1.0),  # 1.2 * sigmoid(2.5) - 0.1 = 1.009, clipped
    (1.0, 1.2 / (1 + math.exp(-1)) - 0.1), (math.log(11), 1.0), (math.log(1 / 11), 0.0),  # where the clipping starts
])
def test_hard_concrete_value(score: float, mask: float) -> None:
    got = GATE.value(torch.tensor(score, dtype=torch.float64))
    assert float(got) == mask if abs(score) == 3 else float(got) == pytest.approx(mask, abs=1e-12)


@pytest.mark.parametrize("score", [-2.0, -0.5, 0.0, 1.0, 2.5])
def test_hard_concrete_probability_and_draws(score: float) -> None:
    n, scores = 40_000, torch.full((40_000,), score)
    p = 1 / (1 + math.exp(-(score - 2 / 3 * math.log(0.1 / 1.1))))
    assert float(GATE.probability(torch.tensor(score))) == pytest.approx(p, rel=1e-5)
    draws = GATE.sample(scores, torch.Generator().manual_seed(0))
    assert abs(float((draws > 0).float().mean()) - p) < 3 * math.sqrt(p * (1 - p) / n)
    # by the symmetry of u, P(mask < 1) at s is P(mask > 0) at -s
    q = 1 / (1 + math.exp(-(-score - 2 / 3 * math.log(0.1 / 1.1))))
    assert abs(float((draws < 1).float().mean()) - q) < 3 * math.sqrt(q * (1 - q) / n)
    assert float(draws.min()) >= 0 and float(draws.max()) <= 1


def test_straight_through_draws_are_binary_with_the_soft_gradient() -> None:
    scores = torch.linspace(-1, 1, 500).requires_grad_()
    soft = GATE.sample(scores, torch.Generator().manual_seed(1))
    (soft_grad,) = torch.autograd.grad(soft.sum(), scores)
    hard = HardConcrete(straight_through=True).sample(scores, torch.Generator().manual_seed(1))
    (hard_grad,) = torch.autograd.grad(hard.sum(), scores)
    assert torch.equal(hard, (soft > 0.5).float()) and torch.equal(hard_grad, soft_grad)


def test_same_generator_same_draw() -> None:
    a, b = (GATE.sample(torch.zeros(50), torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(a, b) and a.unique().numel() > 10


def test_step_gate_value_and_gradient() -> None:
    scores = torch.tensor([-2.0, -0.1, 0.0, 0.1, 2.0], dtype=torch.float64, requires_grad=True)
    out = StepGate(width=0.5).value(scores)
    out.sum().backward()
    s = torch.sigmoid(scores.detach() / 0.5)
    assert out.tolist() == [0, 0, 0, 1, 1]
    torch.testing.assert_close(scores.grad, s * (1 - s) / 0.5)
    unit = torch.zeros(1, requires_grad=True)
    StepGate(width=1.0).value(unit).sum().backward()
    assert unit.grad.item() == 0.25  # type: ignore[union-attr]  # sigmoid'(0)


@pytest.mark.parametrize("gate", [HardConcrete(), HardConcrete(straight_through=True), StepGate()])
def test_open_and_closed_scores_are_exact(gate: HardConcrete | StepGate) -> None:
    scores = torch.tensor([gate.closed_score, gate.open_score])
    assert gate.value(scores).tolist() == [0.0, 1.0] and gate.kept(scores).tolist() == [False, True]


def test_mix_is_exact_at_0_and_1() -> None:
    clean, ablated = torch.linspace(-3, 3, 120).view(2, 3, 4, 5), torch.full((4, 5), 1e-3)
    mask = torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None].expand(4, 5)
    out = mix(clean, ablated, mask)
    assert torch.equal(out[:, :, [1, 3]], clean[:, :, [1, 3]])
    assert torch.equal(out[:, :, [0, 2]], ablated[[0, 2]].expand(2, 3, 2, 5))
    half = mix(clean.to(torch.bfloat16), ablated, mask)
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("ablated_shape", [(2, 3, 4), (3, 4), (4,), (1, 3, 4), ()])
@pytest.mark.parametrize("mask_shape", [(4,), ()])
def test_mix_gradients(ablated_shape: tuple[int, ...], mask_shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 4), ablated_shape, mask_shape)
    clean, ablated, mask = (torch.rand(s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes)
    assert torch.autograd.gradcheck(Mix.apply, (clean, ablated, mask))


def test_mix_has_no_second_derivative_and_says_so() -> None:
    """Its backward is not itself recorded: a silent second derivative would be wrong."""
    clean, mask = torch.ones(2, 3, 4), torch.full((4,), 0.5, requires_grad=True)
    (slope,) = torch.autograd.grad(mix(clean, torch.zeros(4), mask).pow(2).sum(), mask, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_scores_that_do_not_reach_0_and_1_are_refused() -> None:
    with pytest.raises(ValueError, match=r"give masks of 0\.962 and 0\.0384 with gamma=-0\.01, zeta=1\.01"):
        HardConcrete(gamma=-0.01, zeta=1.01)


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"beta": -1.0}, {"gamma": 0.1}, {"zeta": math.nan}, {"open_score": math.inf}])
def test_numbers_that_make_no_gate_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        HardConcrete(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="width=0"):
        StepGate(width=0.0)
