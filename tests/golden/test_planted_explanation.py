"""Explanations of wired models, whose paths are known: who feeds whom, where a planted head attends, and that chance claims nothing."""

from __future__ import annotations

import pytest
import torch
from planted import PLANTS, Plant, circuit_of, leaves_of
from torch import Tensor

import tl_nodeprune as tlnp
from tl_nodeprune.evidence.explanations.circuit_run import CircuitRun
from tl_nodeprune.evidence.explanations.path_patching import path_effects
from tl_nodeprune.evidence.units import Unit


def planted(name: str, seed: int) -> tuple[Plant, tlnp.PromptPairs, tlnp.Circuit]:
    plant = PLANTS[name](seed)
    return plant, plant.prompts(24, 0), circuit_of(plant.space(), plant.truths[0])


def edge(found: tlnp.Explanation, sender: str, receiver: str) -> float:
    rows = found.edges[(found.edges["sender"] == sender) & (found.edges["receiver"] == receiver)]
    return float(rows["effect"].iloc[0])


def heads_of(plant: Plant) -> list[str]:
    return sorted({f"head {layer}.{index[0]}" for kind, layer, *index in plant.truths[0] if kind == "attn_neuron"})


@pytest.mark.parametrize("seed", [0, 1])
def test_lookup_goes_from_the_head_through_the_mlp_to_the_logits(seed: int) -> None:
    plant, prompts, circuit = planted("lookup", seed)
    found = tlnp.explain(plant.model, circuit, prompts)
    (head,), effects = heads_of(plant), {node.name: node.effect for node in found.nodes}
    assert set(effects) == {head, "MLP 1"} and all(node.stands_out for node in found.nodes)
    first = tlnp.explain(plant.model, circuit, prompts[:found.n_paths])
    whole = {node.name: node.effect for node in first.nodes}
    assert edge(found, head, "MLP 1") == pytest.approx(whole[head], rel=0.02)  # all of its work, but for the leak of junk dims
    assert edge(found, "MLP 1", "logits") == pytest.approx(whole["MLP 1"], rel=0.02)
    assert abs(edge(found, head, "logits")) < 0.01 * abs(whole[head])
    assert f"It reads {head} (" in found.text or "works through MLP 1 (" in found.text  # told from whichever of the two is stronger


@pytest.mark.parametrize("seed", [0, 1])
def test_induction_is_told_as_induction(seed: int) -> None:
    plant, prompts, circuit = planted("induction", seed)
    found = tlnp.explain(plant.model, circuit, prompts)
    before, matcher = heads_of(plant)
    role = next(node for node in found.nodes if node.name == matcher)
    assert role.attention(1)[0][0] == "the answer, after an earlier copy of the current token" and role.attention(1)[0][1] > 0.9
    assert role.to_answer > role.to_wrong and role.direct == pytest.approx(found.circuit.logit_diff, rel=0.05)
    assert edge(found, before, matcher) < 0 and abs(edge(found, before, "logits")) < 0.01 * abs(edge(found, before, matcher))
    first = tlnp.explain(plant.model, circuit, prompts[:found.n_paths])
    assert edge(found, before, matcher) == pytest.approx(next(node.effect for node in first.nodes if node.name == before), rel=0.02)


def test_a_path_is_the_receivers_output_computed_anew_by_hand() -> None:
    """The closed form in a model without norms: stream minus the sender's change, through the receiver's weights, back into the stream."""
    plant, prompts, circuit = planted("lookup", 0)
    (kind, layer, head, _), model = next(leaf for leaf in sorted(plant.truths[0]) if leaf[0] == "attn_neuron"), plant.model
    assert kind == "attn_neuron"
    head_unit, mlp = Unit("head", layer, (head,)), Unit("mlp", 1)
    names = ["blocks.0.hook_attn_out", "blocks.1.hook_resid_mid", "blocks.1.mlp.hook_post", "blocks.1.hook_mlp_out"]
    names += ["blocks.2.hook_resid_post"]
    with torch.no_grad():
        run = CircuitRun(model, circuit, prompts, [head_unit, mlp])
        paths = path_effects(run, [head_unit, mlp])
        base, seen = run(keep={name: Tensor.clone for name in names})
        cut = run(without=[head_unit], keep={names[0]: Tensor.clone})[1]
        block = model.blocks[1].mlp
        mid = seen["blocks.1.hook_resid_mid"] - (seen[names[0]] - cut[names[0]])
        post = (mid @ block.W_in + block.b_in).relu()
        mask, other = circuit["blocks.1.mlp.hook_post"], run.stand_in("blocks.1.mlp.hook_post")
        out = (mask * post + (1 - mask) * other) @ block.W_out + block.b_out
        keep, stand = circuit["blocks.1.hook_mlp_out"], run.stand_in("blocks.1.hook_mlp_out")
        new = keep * out + (1 - keep) * stand
        later = seen["blocks.2.hook_resid_post"] + new - seen["blocks.1.hook_mlp_out"]  # layer 2 is all pruned: it does not react
        want = run.score(run.at_answer(later) @ model.W_U)[0] - run.score(base)[0]
    assert paths[head_unit, mlp].tolist() == pytest.approx(want.tolist(), abs=1e-4) and float(want.abs().min()) > 1


def test_distractors_are_no_finding() -> None:
    """The negative control: a circuit of everything but the planted nodes does not do the task, and the text claims no node."""
    plant = PLANTS["lookup"](0)
    prompts, space = plant.prompts(24, 0), plant.space()
    found = tlnp.explain(plant.model, circuit_of(space, [leaf for leaf in leaves_of(space) if leaf not in plant.truths[0]]), prompts)
    assert "no node stands out" in found.text and "does not do the task" in found.text and "not as a finding" in found.text
    assert found.effects["effect"].abs().max() < 0.5 and found.circuit.logit_diff < 0
