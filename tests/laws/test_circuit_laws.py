"""Laws of frozen circuits: set algebra on leaves, consistency, save and load, and the seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from circuits import circuit_logits, random_circuit

import tl_nodeprune as tlnp
from tl_nodeprune.nodes.hooks import capture
from tl_nodeprune.nodes.probe import find_nodes

Toy = tuple[Any, tlnp.PromptPairs]
# every coarse gate here is covered by finer ones or a leaf itself, so that complement is defined on leaves alone
SUBSETS = [None, ("layer",), ("head", "mlp"), ("attn", "head"), ("attn", "attn_neuron"), ("head", "attn_neuron", "mlp_out"),
           ("mlp", "mlp_neuron", "mlp_out"), ("layer", "attn", "mlp"), ("layer", "head", "mlp_neuron")]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("granularities", SUBSETS)
def test_complement_and_joins(toy: Toy, granularities: Any, seed: int) -> None:
    space = find_nodes(toy[0]).restrict(granularities)
    c, d = random_circuit(space, seed, 0.7), random_circuit(space, seed + 10, 0.4)
    full, empty = tlnp.Circuit.full(space), tlnp.Circuit.empty(space)
    assert ~~c == c
    assert (c & ~c) == empty and (c & ~c).size == 0
    assert (c | ~c) == full and (c | ~c).size == c.size_total
    assert (c & d) == (d & c) and (c | d) == (d | c) and (c & full) == c and (c | empty) == c
    assert ~full == empty and ~empty == full
    assert c.size + (~c).size == c.size_total and c.iou(c) == 1 and c.iou(~c) == 0
    for key in space.finest():
        assert not (c.live(*key) & (~c).live(*key)).any()


def test_complement_leaves_an_uncovered_gate_as_it_is(toy: Toy) -> None:
    """"layer" above "head" alone: the layer's MLP is not gated, so the layer gate is no mere sum of its leaves."""
    space = find_nodes(toy[0]).restrict(("layer", "head"))
    c = tlnp.Circuit(space, {key: torch.ones(shape) * (key.layer != 1) for key, shape in space.shapes.items()})
    assert ~~c == c and (c & ~c).count() == {"layer": 2, "head": 0}
    assert [bool((~c).live("layer", layer)) for layer in range(3)] == [True, False, True]


@pytest.mark.parametrize("ablation", ["interchange", "zero"])
@pytest.mark.parametrize("granularities", [None, ("layer",), ("layer", "head"), ("layer", "head", "mlp_neuron"), ("layer", "attn", "mlp")])
def test_folded_masks_are_the_circuit_by_the_equation_as_it_stands(each_toy: Toy, granularities: Any, ablation: str) -> None:
    """Plain hooks that write `m * clean + (1 - m) * ablated`, at every hook point alike; with the circuit's own masks they do not."""
    model, prompts = each_toy
    space = find_nodes(model).restrict(granularities)
    without = tlnp.Circuit(space, {key: torch.full(shape, float(key != ("layer", 1))) for key, shape in space.shapes.items()})
    circuit = (random_circuit(space, 3, 0.8) & without).under(ablation)
    rows, wanted = torch.arange(len(prompts)), circuit_logits(model, circuit, prompts)

    def by_the_equation(masks: dict[str, torch.Tensor]) -> torch.Tensor:
        corrupted = capture(model, prompts.corrupted, list(masks))
        hooks = [(hook, lambda x, hook, m=mask, a=corrupted[hook] * (ablation != "zero"): m * x + (1 - m) * a)
                 for hook, mask in masks.items()]
        with torch.no_grad():
            return model.run_with_hooks(prompts.clean, fwd_hooks=hooks)[rows, prompts.answer_positions]

    folded = circuit.folded()
    assert not any(hook.endswith("hook_resid_post") for hook in folded)
    torch.testing.assert_close(by_the_equation(folded), wanted, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(by_the_equation(dict(circuit)), wanted, atol=1e-1)


@pytest.mark.parametrize("granularities", SUBSETS)
def test_circuits_are_consistent(toy: Toy, granularities: Any) -> None:
    space = find_nodes(toy[0]).restrict(granularities)
    c = random_circuit(space, 5, 0.3)
    for key in space.shapes:
        live = c.live(*key)
        for parent in space.ancestors(key):
            above = c.live(*parent)
            assert not (live & ~tlnp.nodes.space.spread(above, live.ndim)).any(), "a live child under a closed parent"
        if space.covered(key) and live.ndim == 0:
            assert bool(live) == any(bool(c.live(*child).any()) for child in space.children(key)), "a hollow parent"
    assert all(set(mask.unique().tolist()) <= {0.0, 1.0} and mask.dtype == torch.float32 for mask in c.values())


def test_circuit_is_frozen(toy: Toy) -> None:
    c = tlnp.Circuit.full(find_nodes(toy[0]))
    hook = next(iter(c))
    c[hook].zero_()
    c.masks[hook].zero_()
    c.live("layer", 0).zero_()
    assert c == tlnp.Circuit.full(c.space) and bool((c[hook] == 1).all())


@pytest.mark.parametrize("ablation", ["interchange", "zero", "mean", "optimal"])
def test_save_then_load_is_the_same(toy: Toy, tmp_path: Path, ablation: str) -> None:
    model, prompts = toy
    space = find_nodes(model).restrict(None, layers=[0, -1])
    fitted = tlnp.Ablation(ablation).fit(model, prompts, space.hooks)
    c = tlnp.Circuit(space, random_circuit(space, 2, 0.7)._live, fitted)
    c.save(tmp_path / "c.safetensors")
    back = tlnp.Circuit.load(tmp_path / "c.safetensors")
    assert back == c and back.space == c.space and back.ablation.name == ablation and list(back) == list(c)
    assert all(torch.equal(back[hook], c[hook]) for hook in c)
    assert set(back.ablation.constants) == set(fitted.constants) == (set(space.hooks) if ablation in ("mean", "optimal") else set())
    assert all(torch.equal(back.ablation.constants[hook], value) for hook, value in fitted.constants.items())
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]  # no part file left
    assert tlnp.evaluate(model, back, prompts) == tlnp.evaluate(model, c, prompts)


def test_same_seed_same_circuit(toy: Toy) -> None:
    model, prompts = toy
    found = []
    for _ in range(2):
        masks = model.add_node_masks()
        found.append(masks.prune(prompts, max_kl=0.2, steps=20, seed=3, step_prompts=16, progress=False))
        assert masks.attached and masks.to_circuit() == found[-1].circuit
        model.remove_node_masks()
    assert found[0].circuit == found[1].circuit and found[0].kl == found[1].kl
    assert found[0].converged is not False and found[0].kl <= 0.2


ALL = ("layer", "attn", "mlp", "head", "attn_neuron", "mlp_neuron", "mlp_out")


@pytest.mark.parametrize("granularities", SUBSETS)
def test_a_view_is_idempotent_monotone_and_its_own_at_its_own_granularities(toy: Toy, granularities: Any) -> None:
    space = find_nodes(toy[0]).restrict(granularities)
    c, d = random_circuit(space, 1, 0.2), random_circuit(space, 2, 0.5)
    assert c.at(space.granularities) == c
    for names in (*ALL, ("head", "mlp"), ALL):
        seen = c.at(names)
        assert seen.at(names) == seen and seen.at(tuple(reversed(seen.space.granularities))) == seen
        assert (c & d).at(names) <= seen <= (c | d).at(names)
        assert c.at(("attn_neuron", "mlp_out", *space.granularities)).at(names) == seen, "the way does not matter"
    assert tlnp.Circuit.full(space).at(ALL) == tlnp.Circuit.full(find_nodes(toy[0]))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("granularities", [*SUBSETS, ("layer", "head")])
def test_difference_and_order(toy: Toy, granularities: Any, seed: int) -> None:
    space = find_nodes(toy[0]).restrict(granularities)
    c, d, e = (random_circuit(space, seed + 10 * i, share) for i, share in enumerate((0.7, 0.5, 0.6)))
    empty = tlnp.Circuit.empty(space)
    for key in space.finest():
        left, both = (c - d).live(*key), (c & d).live(*key)
        assert not (left & both).any() and torch.equal(left | both, c.live(*key))
        assert torch.equal(left, c.live(*key) & ~d.live(*key))
    assert (c - d) | (c & d) == c and (c - d) | c == c
    assert c <= c and not c < c and c & d <= c <= c | d and empty <= c and (c & d < c) == (c & d != c)
    assert (c <= d and d <= c) == (c == d) and (c >= c & d) and (c <= d) == (c & d == c) == (c | d == d)
    assert c & d & e <= d & e <= e and c & d & e <= e
    if not any(space.covered(key) is False and key not in space.finest() for key in space.shapes):
        assert c - c == empty and c - empty == c and c - d == c & ~d


@pytest.mark.parametrize("granularities", [*SUBSETS, ("layer", "head"), "head", "mlp", ("mlp", "mlp_neuron")])
def test_masks_then_circuit_is_the_same(toy: Toy, granularities: Any) -> None:
    model, space = toy[0], find_nodes(toy[0]).restrict(granularities)
    c = random_circuit(space, 4, 0.5)
    back = tlnp.Circuit.from_masks(model, dict(c))
    assert back.at(space.granularities) == c and all(torch.equal(back[hook], c[hook]) for hook in c)
    assert (back == c) == (back.space.granularities == space.granularities)
    assert tlnp.Circuit.from_nodes(model, {name: c.nodes(name) for name in space.granularities}) == c
    one_each = {key.hook: c.live(*key) for key in space.shapes}
    if len(one_each) == len(space.shapes):
        assert tlnp.Circuit.from_masks(model, one_each) == c
