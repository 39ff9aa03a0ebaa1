"""Explanations: roles, direct attribution, the object's forms, and models and prompts of every kind."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tl_nodeprune as tlnp
from tl_nodeprune.evidence.explanations.attention_roles import by_role, even, roles_of
from tl_nodeprune.evidence.explanations.circuit_run import CircuitRun
from tl_nodeprune.evidence.explanations.readout import Readout, token_text, weighted
from tl_nodeprune.nodes.figures import figures
from tl_nodeprune.nodes.hooks import capture
from tl_nodeprune.nodes.probe import find_nodes

Toy = tuple[Any, tlnp.PromptPairs]
COARSE = ("head", "mlp")


def full(model: Any, granularities: Any = COARSE, ablation: str = "interchange") -> tlnp.Circuit:
    return tlnp.Circuit.full(find_nodes(model).restrict(granularities), tlnp.Ablation(ablation))


def pairs(clean: list[int], corrupted: list[int], answer: Any, wrong: Any, **more: Any) -> tlnp.PromptPairs:
    return tlnp.PromptPairs(torch.tensor([clean]), torch.tensor([corrupted]), torch.tensor([answer]), torch.tensor([wrong]), **more)


def test_roles_of_an_ioi_prompt() -> None:
    """<s> Mary and John went . John gave to -> Mary"""
    (roles,) = roles_of(pairs([0, 5, 9, 6, 7, 4, 6, 8, 3], [0, 5, 9, 6, 7, 4, 5, 8, 3], 5, 6))
    assert roles == ["the first token", "the answer", "another token", "the wrong answer (first time)", "another token", "another token",
                     "the wrong answer (second time)", "the previous token", "the current token"]


def test_roles_of_an_induction_prompt_of_several_lengths() -> None:
    """C A B D A -> B, with padding on the right; and the answers of one prompt are several."""
    mask = torch.tensor([[True] * 5 + [False] * 2])
    (roles,) = roles_of(pairs([3, 1, 2, 4, 1, 0, 0], [3, 1, 2, 5, 1, 0, 0], 2, 9, attention_mask=mask))
    assert roles == ["the token before an earlier copy of the current token", "an earlier copy of the current token",
                     "the answer, after an earlier copy of the current token", "the previous token, which the corrupted prompt changes",
                     "the current token"]
    (roles,) = roles_of(pairs([7, 8, 1, 6, 8], [7, 8, 3, 6, 8], [1, 2], [3, -1]))
    assert roles[2] == "an answer, after an earlier copy of the current token"
    (roles,) = roles_of(pairs([7, 8, 1, 6, 8], [7, 8, 3, 6, 8], 4, 3))
    assert roles[2] == "the token after an earlier copy of the current token, which the corrupted prompt changes"
    (roles,) = roles_of(pairs([7, 1, 6, 5, 8], [7, 3, 6, 5, 8], 4, 3))
    assert roles[1] == "a token that the corrupted prompt changes"


def test_shares_by_role_are_those_of_all_attention() -> None:
    roles = [["a", "b", "a"], ["b", "c"]]
    found = by_role(torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.5, 0.0]]), roles)
    assert found == {"a": 0.375, "b": 0.375, "c": 0.25} and list(found) == ["a", "b", "c"]
    assert even(roles) == pytest.approx({"a": 1 / 3, "b": 5 / 12, "c": 1 / 4})


def test_what_all_nodes_write_adds_up_to_the_logit_difference(each_toy: Toy) -> None:
    """Heads, MLPs, the embedding and what is left of the attention blocks (their biases): through the readout, the logits themselves."""
    model, prompts = each_toy
    circuit, found = full(model), tlnp.explain(model, full(model), prompts, nodes=99)
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.{end}" for layer in range(3) for end in ("attn.hook_z", "hook_attn_out")),
             "blocks.2.hook_resid_post"]
    seen = capture(model, prompts.clean, names)
    rows, at = torch.arange(len(prompts)), prompts.answer_positions
    z = [seen[f"blocks.{layer}.attn.hook_z"][rows, at] for layer in range(3)]
    heads = [torch.einsum("bhd,hdm->bm", z[layer], model.blocks[layer].attn.W_O) for layer in range(3)]
    rest = sum(seen[f"blocks.{layer}.hook_attn_out"][rows, at] - heads[layer] for layer in range(3))
    with torch.no_grad():
        logits = CircuitRun(model, circuit, prompts)()[0]
        readout = Readout(model, seen["blocks.2.hook_resid_post"][rows, at], logits)
        added = readout.logits(seen["blocks.0.hook_resid_pre"][rows, at] + rest)
        constant = readout.logits(torch.zeros_like(rest))
        bias = (logits - readout.logits(seen["blocks.2.hook_resid_post"][rows, at])).double()
    others = (weighted(added, logits, prompts.answers) - weighted(added, logits, prompts.wrong_answers)).mean()
    fixed = bias.gather(1, prompts.answers[:, None]) - bias.gather(1, prompts.wrong_answers[:, None])
    total = sum(node.direct for node in found.nodes) + float(others) + float(fixed.mean())
    assert len(found.nodes) == 15 and float(constant.abs().max()) < 1e-6
    assert total == pytest.approx(found.circuit.logit_diff, abs=1e-3)
    assert abs(float(fixed.mean())) < 0.2 * found.circuit.logit_diff  # the biases alone are not the sum


def test_effects_are_those_of_circuits_without_the_node(toy: Toy) -> None:
    model, prompts = toy
    circuit, found = full(model), tlnp.explain(model, full(model), prompts, nodes=3)
    node = found.nodes[0]
    others = {"head": [n for n in circuit.nodes("head") if ("head", *n) != (node.unit.granularity, node.unit.layer, *node.unit.index)],
              "mlp": [n for n in circuit.nodes("mlp") if ("mlp", *n) != (node.unit.granularity, node.unit.layer)]}
    whole, less = (tlnp.evaluate(model, one, prompts) for one in (circuit, tlnp.Circuit.from_nodes(model, others)))
    assert node.effect == pytest.approx(less.logit_diff - whole.logit_diff, abs=1e-4)
    assert node.kl == pytest.approx(less.kl - whole.kl, abs=1e-4) and node.interval[0] <= node.effect <= node.interval[1]
    assert found.circuit.logit_diff == pytest.approx(whole.logit_diff, abs=1e-4) and len(found.nodes) == 3 and len(found.effects) == 15
    assert found.effects["effect"].abs().is_monotonic_decreasing and found.edges["effect"].abs().is_monotonic_decreasing


def test_its_forms(toy: Toy) -> None:
    model, prompts = toy
    found = tlnp.explain(model, full(model, None), prompts)
    lines = str(found).splitlines()
    rows = [line for line in lines if re.match(r"(head|MLP) [\d.]+ +[+-]\d", line)]
    assert len(rows) == len(found.to_frame()) == 10 and len(found.sentences) == 3
    assert all(sentence.endswith(".") for sentence in found.sentences)
    strongest = found.nodes[0]
    verb = "lowers" if strongest.effect < 0 else "raises"
    assert f"cutting {strongest.name} {verb} it by {figures(abs(strongest.effect))}" in found.text
    assert set(found.edges["receiver"]) <= {node.name for node in found.nodes} | {"logits"}
    frame = found.to_frame().set_index("node")
    heads = [node for node in found.nodes if node.unit.granularity == "head"]
    assert heads and all(sum(frame.loc[node.name, "attends_to"].values()) == pytest.approx(1, abs=1e-4) for node in heads)
    neurons = [neuron for node in found.nodes for neuron in node.neurons]
    assert neurons and all(len(neuron.promotes) == 5 and 1 <= len(neuron.top) <= 3 for neuron in neurons)
    assert neurons[0].top[0][0] == max(value for value, _, _ in neurons[0].top)


def test_a_neurons_effect_is_that_of_a_circuit_without_it(toy: Toy) -> None:
    model, prompts = toy
    circuit = full(model, None)
    neuron = next(neuron for node in tlnp.explain(model, circuit, prompts, nodes=2).nodes for neuron in node.neurons)
    gates = {key: circuit.live(*key) for key in circuit.space.shapes}
    gates[next(key for key in gates if key == ("mlp_neuron", neuron.layer))][neuron.index] = False
    less = tlnp.evaluate(model, tlnp.Circuit(circuit.space, gates), prompts)
    assert neuron.effect == pytest.approx(less.logit_diff - tlnp.evaluate(model, circuit, prompts).logit_diff, abs=1e-4)


@pytest.mark.parametrize("ablation", ["zero", "mean"])
@pytest.mark.parametrize("granularities", [COARSE, ("attn", "mlp_neuron"), ("layer",)])
def test_other_ablations_and_granularities(toy: Toy, ablation: str, granularities: tuple[str, ...]) -> None:
    model, prompts = toy
    circuit = full(model, granularities, ablation)
    circuit = circuit.under(circuit.ablation.fit(model, prompts, circuit.space.hooks))
    found = tlnp.explain(model, circuit, prompts[:6], nodes=4)
    assert len(found.nodes) == min(4, len(found.effects)) and found.ablation == ablation
    assert found.edges.empty == (granularities == ("layer",)) and str(found)


def test_one_prompt_claims_no_interval_and_one_batch_is_as_many(toy: Toy) -> None:
    model, prompts = toy
    one = tlnp.explain(model, full(model), prompts[:1], nodes=2)
    assert all(math.isnan(end) for end in one.nodes[0].interval) and "On one prompt" in one.text
    circuit = full(model, ("head", "mlp_neuron"))
    twice = tlnp.explain(model, full(model), prompts[[0, 0]], nodes=2)  # the same prompt again is no second one
    assert all(math.isnan(end) for end in twice.nodes[0].interval)
    whole, parts = (tlnp.explain(model, circuit, prompts[:6], nodes=4, batch_size=size) for size in (64, 4))
    for name in ("effect", "kl", "direct"):
        assert whole.to_frame()[name].tolist() == pytest.approx(parts.to_frame()[name].tolist(), abs=1e-3)
    assert whole.edges["effect"].tolist() == pytest.approx(parts.edges["effect"].tolist(), abs=1e-3)


def test_prompts_of_several_lengths_are_as_one_by_one(toy: Toy) -> None:
    """A short prompt beside a longer one gives what it gives alone."""
    model, prompts = toy
    short, long = prompts.clean[0, :-2], prompts.clean[1]
    width, mask = len(long), torch.arange(len(long))[None] < torch.tensor([[len(short)], [len(long)]])
    padded = tlnp.PromptPairs(torch.stack([torch.nn.functional.pad(short, (0, width - len(short))), long]),
                              torch.stack([torch.nn.functional.pad(prompts.corrupted[0, :-2], (0, 2)), prompts.corrupted[1]]),
                              prompts.answers[:2], prompts.wrong_answers[:2], mask)
    both = tlnp.explain(model, full(model), padded, nodes=4)
    alone = [tlnp.explain(model, full(model), one, nodes=15)
             for one in (tlnp.PromptPairs(short[None], prompts.corrupted[:1, :-2], prompts.answers[:1], prompts.wrong_answers[:1]),
                         prompts[1])]
    for node in both.nodes:
        same = [next(other for other in found.nodes if other.name == node.name) for found in alone]
        assert node.effect == pytest.approx(sum(other.effect for other in same) / 2, abs=1e-3)
        assert node.to_answer == pytest.approx(sum(other.to_answer for other in same) / 2, abs=1e-3)


def test_several_right_answers(toy: Toy) -> None:
    model, prompts = toy
    other = torch.where(prompts.wrong_answers == 107, 108, 107)
    other = torch.where(other == prompts.answers, -1, other)
    several = tlnp.PromptPairs(prompts.clean, prompts.corrupted, torch.stack([prompts.answers, other], 1), prompts.wrong_answers)
    found = tlnp.explain(model, full(model), several, nodes=3)
    assert any("an answer" in role for node in found.nodes for role in node.attends)


def llama(kv_heads: int, attention: str = "eager") -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=kv_heads, max_position_embeddings=16, attn_implementation=attention)
    return TransformerBridge.boot_transformers("meta-llama/Llama-2-7b-hf", hf_model=LlamaForCausalLM(config).eval(),
                                               tokenizer=tlnp.toy.load(n=1)[0].tokenizer, device="cpu").eval()


def random_prompts(n: int = 6) -> tlnp.PromptPairs:
    generator = torch.Generator().manual_seed(0)
    clean, corrupted = (torch.randint(0, 40, (n, 7), generator=generator) for _ in range(2))
    return tlnp.PromptPairs(clean, corrupted, torch.full((n,), 3), torch.full((n,), 4))


def test_grouped_queries_and_no_tokenizer() -> None:
    model = llama(2)
    model.tokenizer = None
    found = tlnp.explain(model, full(model, None), random_prompts())
    assert {node.unit.granularity for node in found.nodes} == {"head", "mlp"} and not found.notes
    assert all(token.isdigit() for node in found.nodes for token in node.promotes) and token_text(model, 7) == "7"


def test_an_untrained_model_has_no_node_that_stands_out_as_a_part_of_a_task() -> None:
    """The negative control: effects of chance are not told as findings."""
    model = llama(4)
    nothing = tlnp.Circuit.from_nodes(model, {"head": [(0, 1)], "mlp": []})
    found = tlnp.explain(model, nothing, random_prompts(40))
    assert "no node stands out" in found.text and "not as a finding" in found.text


def test_a_model_that_gives_no_pattern_says_so(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = toy
    table = {name: point for name, point in dict(model.hook_dict).items() if not name.endswith("hook_pattern")}
    monkeypatch.setattr(type(model), "hook_dict", property(lambda self: table))
    found = tlnp.explain(model, full(model), prompts[:4])
    assert any("Attention cannot be shown" in note for note in found.notes) and not any(node.attends for node in found.nodes)
    assert "Attention cannot be shown" in str(found)


def test_a_circuit_without_heads_or_without_mlps(toy: Toy) -> None:
    model, prompts = toy
    for only, kind in (("mlp", "mlp"), ("head", "head")):
        found = tlnp.explain(model, full(model, only), prompts[:4])
        assert {node.unit.granularity for node in found.nodes} == {kind} and not found.edges.empty


def test_what_cannot_be_explained_is_refused(toy: Toy) -> None:
    model, prompts = toy
    space = find_nodes(model)
    with pytest.raises(ValueError, match="the circuit is empty"):
        tlnp.explain(model, tlnp.Circuit.empty(space), prompts)
    with pytest.raises(ValueError, match="corrupted prompts are missing"):
        tlnp.explain(model, full(model), tlnp.PromptPairs(prompts.clean, prompts.clean, prompts.answers, prompts.wrong_answers))
    with pytest.raises(ValueError, match="nodes=0"):
        tlnp.explain(model, full(model), prompts, nodes=0)
def test_html_escapes_what_tokens_say(markup_toy: Toy) -> None:
    model, prompts = markup_toy
    html = tlnp.explain(model, full(model), prompts)._repr_html_()
    assert "<img" not in html and "onerror=run()>" not in html


def test_it_draws(toy: Toy, tmp_path: Path) -> None:
    model, prompts = toy
    found = tlnp.explain(model, full(model), prompts)
    drawn = tlnp.viz.explanation(found, task="ioi", edges=5)
    lines = [trace for trace in drawn.data if trace.mode == "lines" and trace.x[0] is not None]
    assert len(lines) <= 5
    widths = {trace.name: trace.line.width for trace in lines}
    top = found.edges.iloc[0]
    assert max(widths, key=lambda name: widths[name]) == f"{top.sender} to {top.receiver}"
    shown = {name.split("<br>")[0] for trace in drawn.data if trace.text is not None for name in trace.text}
    assert {node.name for node in found.nodes} <= shown
    ups = [trace.y[0] < trace.y[-1] for trace in lines]
    assert all(ups)  # layers go upwards
    head = next(node.unit for node in found.nodes if node.attends)
    view = tlnp.viz.answer_attention(model, full(model), prompts, (head.layer, *head.index), most=2)
    path = tlnp.viz.save_html(tmp_path / "page.html", found, drawn, view, pd.DataFrame({"a": [1]}))
    assert found.sentences[2].replace("'", "&#x27;") in path.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"head=\(0, 9\)"):
        tlnp.viz.answer_attention(model, full(model), prompts, (0, 9))


def test_gpt2s_shape_reads_out(other_model: Any) -> None:
    model, generator = other_model, torch.Generator().manual_seed(1)
    clean, corrupted = (torch.randint(0, 199, (4, 6), generator=generator) for _ in range(2))
    prompts = tlnp.PromptPairs(clean, corrupted, torch.full((4,), 3), torch.full((4,), 4))
    found = tlnp.explain(model, full(model), prompts)
    assert not found.notes and not any(math.isnan(node.direct) for node in found.nodes)
