"""Losses and gradients of circuits: those of `evaluate`, many at once as one by one, each prompt's gradient as that prompt's alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from landscapes import all_rows, circuit_of, landscape_of, random_kept

import tl_nodeprune as tlnp
from tl_nodeprune.circuit.conversion import leaves_of
from tl_nodeprune.masks.landscape import circuits_of
from tl_nodeprune.nodes.attachment import temporary_hooks
from tl_nodeprune.nodes.space import GateKey

Toy = tuple[Any, tlnp.PromptPairs]


@pytest.fixture()
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any CPU runs bfloat16 under autocast, if slowly."""
    monkeypatch.setattr("tl_nodeprune.masks.landscape._fast_at_half", lambda device: True)


def test_bfloat16_is_for_gradients_alone(frozen_toy: Toy, able: None) -> None:
    landscape = landscape_of(frozen_toy)
    rows, flat = all_rows(landscape), torch.full((landscape.n_prompts, landscape.n), 0.5)
    kept, exact = random_kept(landscape, 0.5).float()[None], landscape.gradient(flat, all_rows(landscape), 0)[1]
    before = landscape.losses(kept, rows)
    landscape.try_half()
    assert landscape.half
    near = landscape.gradient(flat, rows, 0)[1]
    assert not torch.equal(near, exact) and torch.nn.functional.cosine_similarity(near, exact).min() > 0.97
    assert near.dtype == torch.float32 and torch.equal(landscape.losses(kept, rows).loss, before.loss)


@pytest.mark.parametrize("what", ["raises", "differs", "half already", "other machine"])
def test_bfloat16_is_left_where_it_does_not_serve(frozen_toy: Toy, what: str, able: None, monkeypatch: pytest.MonkeyPatch,
                                                  no_hooks_left: Any) -> None:
    def odd(activation: Tensor, hook: Any) -> Tensor | None:
        if not torch.is_autocast_enabled("cpu"):
            return None
        if what == "raises":
            raise RuntimeError("expected scalar type Float but found BFloat16")
        return activation.roll(1, 0)

    landscape = landscape_of(frozen_toy)
    model = landscape.reference.model
    if what == "half already":
        monkeypatch.setattr(model, "parameters", lambda: iter([torch.zeros(1, dtype=torch.bfloat16)]))
    if what == "other machine":
        monkeypatch.setattr("tl_nodeprune.masks.landscape._fast_at_half", lambda device: False)
    with temporary_hooks(model, [("blocks.1.hook_resid_post", odd)] if what in ("raises", "differs") else []):
        landscape.try_half()
    assert not landscape.half
    no_hooks_left(model)


@pytest.mark.parametrize("granularities", [None, ("attn", "head", "mlp", "mlp_neuron"), ("layer", "head", "mlp_neuron")])
@pytest.mark.parametrize("ablation", tlnp.masks.ablation.ABLATIONS)
def test_a_loss_is_that_of_the_circuit(frozen_toy: Toy, ablation: str, granularities: tuple[str, ...] | None) -> None:
    """Also where whole blocks are closed: a circuit closes their gates too, which puts the block's stand-in in place of its parts'."""
    model, prompts = frozen_toy
    landscape = landscape_of(frozen_toy, granularities, ablation)
    generator = torch.Generator().manual_seed(0)
    for constant in landscape.constants.values():
        constant.data += 0.1 * torch.randn(constant.shape, generator=generator)
    kept = random_kept(landscape, 0.6)
    for key, ids in landscape.gates(torch.arange(landscape.n)).items():
        if key in landscape.keys and (key.layer == 1 or key.layer == 2 and key.granularity in ("attn_neuron", "head")):
            kept[ids.flatten()] = False
    loss, circuit = float(landscape.losses(circuits_of([kept]), all_rows(landscape)).loss.mean()), circuit_of(landscape, kept)
    assert not circuit.live(landscape.space.granularities[0], 1).any() and torch.equal(leaves_of(circuit), kept)
    assert loss > 0.01 and tlnp.evaluate(model, circuit, prompts).kl == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("ablation", ["interchange", "zero"])
def test_many_circuits_at_once_are_the_same_as_one_by_one(frozen_toy: Toy, ablation: str) -> None:
    """The batch size cuts through circuits and prompts."""
    landscape, rows = landscape_of(frozen_toy, None, ablation, batch_size=7), torch.tensor([3, 0, 8, 21, 5])
    circuits = [random_kept(landscape, share, seed) for seed, share in enumerate((1.0, 0.9, 0.5, 0.0))]
    together = landscape.losses(circuits_of(circuits), rows)
    assert together.loss.shape == (4, 5) and together.loss[0].abs().max() < 1e-6 < 0.1 < together.loss[3].min()
    for i, kept in enumerate(circuits):
        alone = landscape.losses(circuits_of([kept]), rows)
        for at_once, one in zip(together, alone, strict=True):
            torch.testing.assert_close(at_once[i], one[0], rtol=1e-4, atol=1e-5)


def test_a_wrong_choice_is_one_unlike_the_full_models(frozen_toy: Toy) -> None:
    model, prompts = frozen_toy
    landscape = landscape_of(frozen_toy, ("head", "mlp"))
    losses = landscape.losses(torch.stack([torch.ones(landscape.n), torch.zeros(landscape.n)]), all_rows(landscape))
    with torch.no_grad():
        full, corrupted = (prompts.logit_diff(model(side)[all_rows(landscape), prompts.answer_positions])
                           for side in (prompts.clean, prompts.corrupted))
    assert not losses.wrong[0].any() and losses.wrong[1].tolist() == (full * corrupted < 0).float().tolist() and losses.wrong[1].any()
    assert losses.hinge[1][full * corrupted < 0].min() >= 1


@pytest.mark.parametrize(("granularities", "ablation"), [
    (None, "interchange"), (("head", "mlp"), "mean"), (("layer", "attn", "mlp_neuron"), "zero"), (("mlp_out",), "interchange")])
def test_each_prompts_gradient_is_that_of_the_prompt_alone(frozen_toy: Toy, granularities: tuple[str, ...] | None, ablation: str) -> None:
    landscape, rows = landscape_of(frozen_toy, granularities, ablation), torch.tensor([0, 7, 4])
    gates = torch.rand(3, landscape.n, generator=torch.Generator().manual_seed(0))
    losses, gradients = landscape.gradient(gates, rows, 0)
    for i in range(3):
        loss, gradient = landscape.gradient(gates[i:i + 1], rows[i:i + 1], 0)
        assert float(loss.loss) == pytest.approx(float(losses.loss[i]), rel=1e-4, abs=1e-5)
        assert gradient.abs().max() > 1e-4 and torch.allclose(gradients[i], gradient[0], atol=1e-4 * float(gradient.abs().max()))


def test_the_gradient_is_the_slope_of_the_loss(frozen_toy: Toy) -> None:
    """By finite differences in float64, along random directions and for the gates of the largest gradient."""
    model, prompts = tlnp.toy.load("ioi", n=4)
    landscape = landscape_of((model.to(torch.float64), prompts), ("head", "mlp"))
    generator = torch.Generator().manual_seed(0)
    gates, rows = 0.2 + 0.6 * torch.rand(1, landscape.n, generator=generator, dtype=torch.float64), torch.tensor([1])
    losses, gradient = landscape.gradient(gates, rows, 0)
    directions = [*torch.randn(2, landscape.n, generator=generator, dtype=torch.float64),
                  *torch.eye(landscape.n, dtype=torch.float64)[gradient[0].abs().topk(2).indices]]
    for direction in directions:
        ends = [landscape.losses(gates + sign * 1e-3 * direction, rows) for sign in (1, -1)]
        rise = [float(end.loss + 0.2 * end.hinge) for end in ends]
        assert (rise[0] - rise[1]) / 2e-3 == pytest.approx(float(gradient[0].double() @ direction), rel=0.01, abs=1e-4)
    assert losses.loss > 0.01


def test_under_zero_ablation_the_nodes_of_a_closed_block_can_return(frozen_toy: Toy) -> None:
    landscape = landscape_of(frozen_toy, ("attn", "head"), "zero")
    kept = torch.ones(landscape.n)
    kept[4:8] = 0
    _, gradient = landscape.gradient(kept.expand(24, -1), all_rows(landscape), 0)
    assert gradient.mean(0)[4:8].abs().min() > 0


def test_constants_learn_with_the_gates_and_can_be_saved(frozen_toy: Toy) -> None:
    landscape, other = (landscape_of(frozen_toy, ("head", "mlp"), "optimal") for _ in range(2))
    gates, rows = torch.full((24, landscape.n), 0.5), all_rows(landscape)
    losses = [float(landscape.gradient(gates, rows, step)[0].loss.mean()) for step in range(12)]
    assert losses[-1] < 0.9 * losses[0]
    other.load_constants({name: value.clone() for name, value in landscape.constants_state().items()})
    for one in (landscape, other):
        one.gradient(gates, rows, 12)
    assert all(torch.equal(value, other.constants[hook]) for hook, value in landscape.constants.items())


def test_nan_is_named_with_the_step_and_where(frozen_toy: Toy) -> None:
    landscape = landscape_of(frozen_toy, ("head", "mlp"))
    rows = all_rows(landscape)[:2]
    with pytest.raises(FloatingPointError, match="NaN or inf in the loss of the circuit at step 5; nothing was changed"):
        landscape.gradient(torch.full((2, landscape.n), math.nan), rows, 5)
    with pytest.raises(FloatingPointError, match="NaN or inf in the logits of the circuit"):
        landscape.losses(torch.full((1, landscape.n), math.nan), rows)


def test_units_are_the_leaves_below_each_coarse_gate(frozen_toy: Toy) -> None:
    landscape = landscape_of(frozen_toy)
    sizes = sorted(len(unit) for unit in landscape.units())
    heads, attns, mlps, layers = 12 * [24], 3 * [96], 3 * [480], 3 * [576]
    assert sizes == sorted(heads + attns + mlps + layers)
    assert landscape_of(frozen_toy, ("attn_neuron",)).units() == []


def test_what_has_no_effect_is_left_out_and_nothing_else(frozen_toy: Toy) -> None:
    landscape, rows = landscape_of(frozen_toy), torch.arange(24)
    kept = random_kept(landscape, 0.7)
    assert torch.equal(landscape.without_moot(kept), kept)
    gates = landscape.gates(kept)
    gates[GateKey("mlp_neuron", 0)].zero_()
    gates[GateKey("mlp_out", 2)].zero_()
    without = landscape.without_moot(kept)
    assert int(without.sum()) < int(kept.sum()) and not bool((without & ~kept).any())
    losses = landscape.losses(circuits_of([kept, without]), rows).loss
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)
