"""PromptPairs: what it takes, what it refuses, padding, several answers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from circuits import full_logits
from torch import Tensor

import tl_nodeprune as tlnp
from tl_nodeprune.nodes.hooks import answer_logits
from tl_nodeprune.nodes.probe import find_nodes
from tl_nodeprune.prompts.checks import FILL

Toy = tuple[Any, tlnp.PromptPairs]
IDS, ONE, TWO = torch.arange(6).view(2, 3), torch.tensor([1, 1]), torch.tensor([2, 2])
ROW = {"clean": "So Mary is a really good friend, isn't", "corrupted": "So John is a really good friend, isn't",
       "answer": " she", "wrong": " he"}


@pytest.mark.parametrize(("given", "text"), [
    ({"corrupted": torch.zeros(2, 4).long()}, r"clean is \(2, 3\) and corrupted \(2, 4\)"),
    ({"clean": torch.zeros(0, 3).long(), "corrupted": torch.zeros(0, 3).long()}, r"clean is empty, \(0, 3\)"),
    ({"clean": torch.zeros(2, 0).long()}, r"clean is empty, \(2, 0\)"),
    ({"clean": IDS.float()}, "clean must be integer token ids.*torch.float32"),
    ({"clean": IDS[0]}, r"clean must be integer.*\(3,\)"),
    ({"clean": [[1, 2, 3]]}, "clean must be integer token ids.*got a list, not a tensor"),
    ({"answers": [1, 1]}, "answers must be integer token ids.*got a list, not a tensor"),
    ({"answers": ONE.bool()}, "answers must be integer token ids.*torch.bool"),
    ({"attention_mask": [[1, 1, 1]] * 2}, "attention_mask is a list, not a tensor"),
    ({"answer_positions": [2, 2]}, "answer_positions must be integers.*got a list, not a tensor"),
    ({"clean": IDS.to("meta")}, 'clean is on the device "meta"'), ({"clean": IDS.to_sparse()}, "clean is sparse"),
    ({"corrupted": torch.nested.nested_tensor([ONE, IDS[0]])}, "corrupted is nested"), ({"answers": ONE * 1j}, "answers is complex"),
    ({"answers": torch.quantize_per_tensor(ONE.float(), 1, 0, torch.qint8)}, "answers is quantised"),
    ({"attention_mask": torch.ones(2, 3) * (1 + 0j)}, "attention_mask is complex; give a plain tensor of real numbers"),
    ({"attention_mask": torch.quantize_per_tensor(torch.ones(2, 3), 1, 0, torch.quint8)}, "attention_mask is quantised"),
    ({"attention_mask": torch.ones(2, 3).to_sparse()}, "attention_mask is sparse"),
    ({"attention_mask": torch.ones(2, 3, device="meta")}, 'attention_mask is on the device "meta"'),
    ({"answer_positions": ONE.to("meta")}, 'answer_positions is on the device "meta"'),
    ({"clean": torch.full((2, 3), 2**63, dtype=torch.uint64)}, "clean holds the token id -9"),
    ({"clean": -IDS}, "clean holds the token id -5"),
    ({"answers": TWO}, r"prompt 0: .*share a token \(2 and 2\)"),
    ({"answers": torch.tensor([[1, FILL], [1, 2]])}, r"prompt 1: .*share a token"),
    ({"answers": torch.tensor([1])}, r"answers must be .*batch=2.*\(1,\)"),
    ({"answers": torch.tensor([1.0, 1.0])}, "answers must be integer"),
    ({"wrong_answers": torch.tensor([[FILL, FILL], [2, 2]])}, "wrong_answers must have one token id or more"),
    ({"attention_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])}, r"attention_mask of prompt 0 is \[1, 0, 1\]"),
    ({"attention_mask": torch.tensor([[0, 0, 0], [1, 1, 1]])}, r"attention_mask of prompt 0 is \[0, 0, 0\]"),
    ({"attention_mask": torch.ones(2, 2)}, r"attention_mask is \(2, 2\).*\(2, 3\)"),
    ({"answer_positions": torch.tensor([0, 3])}, r"answer_positions must point at real tokens.*\[0, 3\]"),
    ({"answer_positions": torch.tensor([0])}, r"answer_positions must be integers \[batch\] with batch=2"),
    ({"answer_positions": torch.tensor([0, 2]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}, r"real tokens.*\[0, 2\]"),
])
def test_refuses_what_does_not_fit(given: dict[str, Tensor], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        tlnp.PromptPairs(**({"clean": IDS, "corrupted": IDS, "answers": ONE, "wrong_answers": TWO} | given))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64])
def test_token_ids_of_any_whole_type(dtype: torch.dtype) -> None:
    wanted = tlnp.PromptPairs(IDS, IDS, ONE, TWO)
    found = tlnp.PromptPairs(IDS.to(dtype), IDS.to(dtype), ONE.to(dtype), TWO.to(dtype), answer_positions=torch.tensor([2, 2]).to(dtype))
    for name in ("clean", "corrupted", "answers", "wrong_answers", "answer_positions"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)) and getattr(found, name).dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.uint8, torch.int64, torch.bool])
def test_masks_of_0_and_1_of_any_real_type(dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    found = tlnp.PromptPairs(IDS, IDS, ONE, TWO, mask.to(dtype))
    assert found.attention_mask.tolist() == [[True, True, False]] * 2 and found.answer_positions.tolist() == [1, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize("device", ["meta", "mkldnn", "vulkan", "hpu", "gpu", "cpu:-1", "", "x" * 99])
def test_devices_that_cannot_compute(device: str) -> None:
    prompts = tlnp.PromptPairs(IDS, IDS, ONE, TWO)
    with pytest.raises(ValueError, match=rf"device '{device}' cannot compute here; this machine has cpu"):
        prompts.to(device)
    assert prompts.to("cpu:0").clean.tolist() == IDS.tolist()


@pytest.mark.parametrize("name", ["clean", "corrupted", "answers", "wrong_answers"])
def test_token_ids_outside_the_vocabulary(toy: Toy, name: str) -> None:
    model, prompts = toy
    values = {f: getattr(prompts, f).clone() for f in ("clean", "corrupted", "answers", "wrong_answers")}
    values[name].view(-1)[-1] = 5000
    bad = tlnp.PromptPairs(**values)
    with pytest.raises(ValueError, match=rf"{name} holds token id 5000.*ends at 198"):
        bad.check_fits(model)
    with pytest.raises(ValueError, match="5000"):
        tlnp.evaluate(model, tlnp.Circuit.full(find_nodes(model)), bad)


def test_prompts_longer_than_the_context(toy: Toy) -> None:
    long = torch.ones(1, 40).long()
    with pytest.raises(ValueError, match="40 tokens, but the model's context is 32"):
        tlnp.PromptPairs(long, long, torch.tensor([1]), torch.tensor([2])).check_fits(toy[0])


def test_from_strings_refuses(toy: Toy) -> None:
    make = lambda *lists: tlnp.PromptPairs.from_strings(toy[0], *lists)  # noqa: E731
    clean, corrupted = [ROW["clean"]], [ROW["corrupted"]]
    with pytest.raises(ValueError, match=r"' Mary John' is 2 tokens"):
        make(clean, corrupted, [" Mary John"], [" he"])
    with pytest.raises(ValueError, match="must differ"):
        make(clean, corrupted, [" he"], [" he"])
    with pytest.raises(ValueError, match=r"prompt 0: clean has \d+ tokens and corrupted 3"):
        make(clean, ["So Mary"], [" she"], [" he"])
    with pytest.raises(ValueError, match="the answer ' dragon' is not in the model's vocabulary"):
        make(clean, corrupted, [" dragon"], [" he"])
    with pytest.raises(ValueError, match="prompts have 41 tokens, but the model's context is 32"):
        make(["Mary " * 40], ["John " * 40], [" she"], [" he"])  # not cut off in silence
    with pytest.raises(TypeError, match="wrong_answers must be several strings or lists of them, but it holds 7"):
        make(clean, corrupted, [" she"], [7])
    with pytest.raises(ValueError, match="'clean': 0"):
        make([], [], [], [])
    with pytest.raises(ValueError, match="'wrong_answers': 2"):
        make(clean, corrupted, [" she"], [" he", " she"])


def test_jsonl_round_trip_and_bad_line(toy: Toy, tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps(ROW) + "\n\n" + json.dumps(ROW) + "\n")
    prompts = tlnp.PromptPairs.from_jsonl(toy[0], path)
    assert len(prompts) == 2 and toy[0].tokenizer.decode(prompts.answers[0]) == "she"
    for bad in ('{"clean": "a"}', "not json", "[1]", '"text"'):
        path.write_text(json.dumps(ROW) + "\n\n" + bad + "\n")
        with pytest.raises(ValueError, match="line 3.*clean, corrupted, answer, wrong"):
            tlnp.PromptPairs.from_jsonl(toy[0], path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="task.jsonl holds no prompt"):
        tlnp.PromptPairs.from_jsonl(toy[0], path)


def test_jsonl_with_a_byte_order_mark_and_what_is_no_character(toy: Toy, tmp_path: Path) -> None:
    path, row = tmp_path / "task.jsonl", {"clean": "So Mary", "corrupted": "So John", "answer": " she", "wrong": " he"}
    path.write_text(json.dumps(row) + "\n", encoding="utf-8-sig")
    assert len(tlnp.PromptPairs.from_jsonl(toy[0], path)) == 1
    for bad in ({"clean": "So \ud800"}, {"answer": [" she", "\udfff"]}):
        path.write_text(json.dumps(row) + "\n" + json.dumps(row | bad) + "\n")
        with pytest.raises(ValueError, match=r"task\.jsonl, line 2: .*half of a surrogate pair"):
            tlnp.PromptPairs.from_jsonl(toy[0], path)
    for text in ("[" * 10**5, '{"clean": ' + "1" * 5000 + "}"):
        path.write_text(json.dumps(row) + "\n" + text)
        with pytest.raises(ValueError, match=r"task\.jsonl, line 2: "):
            tlnp.PromptPairs.from_jsonl(toy[0], path)
    with pytest.raises(ValueError, match="clean holds half of a surrogate pair"):
        tlnp.PromptPairs.from_strings(toy[0], ["So \ud800"], ["So"], [" she"], [" he"])


def test_jsonl_names_the_line_of_a_value_that_is_no_string(toy: Toy, tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | {"clean": 5}) + "\n")
    with pytest.raises(ValueError, match="line 2"):
        tlnp.PromptPairs.from_jsonl(toy[0], path)


def test_split_is_disjoint_and_reproducible(toy: Toy) -> None:
    ids = torch.arange(20).view(10, 2)
    prompts = tlnp.PromptPairs(ids, ids, torch.ones(10).long(), torch.zeros(10).long())
    first, second = prompts.split(0.7, seed=3)
    seen = [*first.clean[:, 0].tolist(), *second.clean[:, 0].tolist()]
    assert (len(first), len(second)) == (7, 3) and sorted(seen) == list(range(0, 20, 2))
    assert torch.equal(prompts.split(0.7, seed=3)[0].clean, first.clean)
    assert not torch.equal(prompts.split(0.7, seed=4)[0].clean, first.clean)
    assert [len(part) for part in prompts.split(0.999, seed=0)] == [9, 1]
    for share in (0.0, 1.0, math.nan, -1):
        with pytest.raises(ValueError, match=f"share={share}"):
            prompts.split(share, seed=0)
    with pytest.raises(ValueError, match="share=0.5 and 1"):
        prompts[0].split(0.5, seed=0)


def test_split_keeps_equal_prompts_together() -> None:
    ids = torch.tensor([[1], [2], [1], [3], [2], [1], [4]])
    prompts = tlnp.PromptPairs(ids, ids + 5, torch.arange(7), torch.full((7,), 9))
    for seed in range(10):
        first, second = prompts.split(0.5, seed=seed)
        assert not set(first.clean.flatten().tolist()) & set(second.clean.flatten().tolist())
        assert len(first.clean.unique()) == 2 and sorted([*first.answers.tolist(), *second.answers.tolist()]) == list(range(7))
    with pytest.raises(ValueError, match="2 different clean prompts or more; got share=0.5 and 1"):
        prompts[[0, 2, 5]].split(0.5, seed=0)


def test_indexing(toy: Toy) -> None:
    _, prompts = toy
    assert len(prompts[3]) == 1 and torch.equal(prompts[-1].clean, prompts.clean[-1:])
    assert torch.equal(prompts[2:5].answers, prompts.answers[2:5])
    assert torch.equal(prompts[[4, 1]].clean, prompts.clean[[4, 1]])
    chosen = prompts.answers > prompts.answers.median()
    assert torch.equal(prompts[chosen].answers, prompts.answers[chosen])
    assert torch.equal(prompts[[4, 1]].answer_positions, prompts.answer_positions[[4, 1]])  # type: ignore[index]
    with pytest.raises(IndexError, match="prompt 24 does not exist; there are 24"):
        prompts[24]
    with pytest.raises(ValueError, match="no prompt left of 24"):
        prompts[30:]


@pytest.mark.parametrize("index", [[], torch.tensor(3)])
def test_odd_indices_answer_as_documented(toy: Toy, index: Any) -> None:
    """No prompt left is a ValueError, whatever indexed; a 0-dim tensor is a single index."""
    if isinstance(index, list):
        with pytest.raises(ValueError, match="no prompt left of 24"):
            toy[1][index]
    else:
        assert torch.equal(toy[1][index].clean, toy[1].clean[3:4])


@pytest.mark.parametrize("positions", [None, "given"])
def test_left_padding_is_right_padding_is_none(toy: Toy, positions: str | None) -> None:
    model, prompts = toy
    n = [int(row.sum()) for row in prompts.attention_mask]  # type: ignore[union-attr]
    width, left, mask = prompts.clean.shape[1], [], []
    for ids, k in zip(prompts.clean, n, strict=True):
        left.append(torch.cat([torch.full((width - k,), 1), ids[:k]]))
        mask.append(torch.cat([torch.zeros(width - k), torch.ones(k)]))
    at = None if positions is None else torch.full((len(n),), width - 1)
    padded = tlnp.PromptPairs(torch.stack(left), torch.stack(left), prompts.answers, prompts.wrong_answers, torch.stack(mask), at)
    assert len(set(n)) > 1 and torch.equal(padded.answer_positions, prompts.answer_positions)  # type: ignore[arg-type]
    right, from_left = (answer_logits(model, p.clean, p.answer_positions, sliced=False)  # type: ignore[arg-type]
                        for p in (prompts, padded))
    torch.testing.assert_close(from_left, right, atol=1e-5, rtol=1e-5)
    alone = torch.cat([model(ids[None, :k])[:, -1] for ids, k in zip(prompts.clean, n, strict=True)])
    torch.testing.assert_close(alone, right, atol=1e-4, rtol=1e-4)


def test_logit_diff_of_several_answers_by_hand() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.5, -1.0, 4.0, 0.0]])
    pairs = tlnp.PromptPairs(IDS, IDS, torch.tensor([[0, 2], [3, FILL]]), torch.tensor([[1, FILL, FILL], [0, 1, 2]]))
    lse = lambda *x: math.log(sum(math.exp(v) for v in x))  # noqa: E731
    want = [lse(0, 2) - 1.0, 0.0 - lse(0.5, -1, 4)]
    torch.testing.assert_close(pairs.logit_diff(logits), torch.tensor(want))
    p = logits.softmax(-1)  # log(p(answers) / p(wrong answers))
    torch.testing.assert_close(pairs.logit_diff(logits)[0], torch.log((p[0, 0] + p[0, 2]) / p[0, 1]))


def test_correct_keeps_what_the_model_answers_right(toy: Toy) -> None:
    model, prompts = toy
    turned = tlnp.PromptPairs(prompts.clean, prompts.corrupted, prompts.wrong_answers, prompts.answers, prompts.attention_mask)
    right = prompts.correct(model, batch_size=7)
    assert 0 < len(right) <= 24 and bool((right.logit_diff(full_logits(model, right)) > 0).all())
    with pytest.raises(ValueError, match="none of the .* prompts right"):
        tlnp.PromptPairs(**{f: getattr(turned, f) for f in turned.__dataclass_fields__})[
            torch.arange(24)[prompts.logit_diff(full_logits(model, prompts)) > 0]].correct(model)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_ids_of_any_integer_type(toy: Toy, dtype: torch.dtype) -> None:
    model, prompts = toy
    small = tlnp.PromptPairs(*(getattr(prompts, name).to(dtype) for name in prompts.__dataclass_fields__))
    assert torch.equal(small.correct(model).clean, prompts.correct(model).clean)
    assert all(getattr(small, name).dtype == torch.long for name in ("clean", "corrupted", "answers", "wrong_answers", "answer_positions"))


def test_correct_is_of_the_full_model_whatever_is_attached(toy: Toy) -> None:
    model, prompts = toy
    right, empty = prompts.correct(model), tlnp.Circuit.empty(find_nodes(model))
    masks = model.add_node_masks()
    try:
        masks.set_to(empty)
        assert torch.equal(prompts.correct(model).clean, right.clean)
    finally:
        model.remove_node_masks()
    with empty.applied(model, prompts):
        assert torch.equal(prompts.correct(model).clean, right.clean)


def test_a_model_without_a_tokenizer_reads_no_strings(fresh_toy: Toy) -> None:
    fresh_toy[0].tokenizer = None
    with pytest.raises(ValueError, match="the model has no tokenizer.*token ids"):
        tlnp.PromptPairs.from_strings(fresh_toy[0], [ROW["clean"]], [ROW["corrupted"]], [" she"], [" he"])


def test_jsonl_is_utf8_with_line_feeds_between_rows(toy: Toy, tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps(ROW | {"clean": ROW["clean"].replace(" ", "\u2028", 1)}, ensure_ascii=False), encoding="utf-8")
    assert len(tlnp.PromptPairs.from_jsonl(toy[0], path)) == 1  # a line separator within a JSON string ends no line
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"task\.jsonl is not UTF-8 text"):
        tlnp.PromptPairs.from_jsonl(toy[0], path)


def test_prompts_differ_where_their_real_tokens_or_answer_positions_do() -> None:
    """Padding has an id too, which a real token may have."""
    ids, mask = torch.tensor([[5, 6, 0]] * 4), torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]])
    pairs = tlnp.PromptPairs(ids, ids, torch.ones(4, dtype=torch.long), torch.zeros(4, dtype=torch.long), mask, torch.tensor([1, 2, 2, 1]))
    assert pairs.distinct().tolist() == [0, 1, 1, 2] and len(pairs.without_repeats()) == 3


@pytest.mark.parametrize("padding", [-math.inf, 0.5, math.nan, -1e4, 2])
def test_masks_of_another_kind_are_refused(toy: Toy, padding: float) -> None:
    """Read as true and false an additive mask is the wrong way round."""
    prompts = toy[1]
    mask = prompts.attention_mask.float().masked_fill(~prompts.attention_mask, padding)  # type: ignore[union-attr]
    mask[0, -1] = padding
    with pytest.raises(ValueError, match="attention_mask holds other values than 0 .* and 1"):
        tlnp.PromptPairs(prompts.clean, prompts.corrupted, prompts.answers, prompts.wrong_answers, mask)


def test_batches_of_no_prompts_are_refused(toy: Toy) -> None:
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size={size}; it must be a whole number, 1 or more"):
            toy[1].batches(size)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_padding_where_attention_is_not_causal(toy: Toy, bidirectional: bool) -> None:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        use_bidirectional_attention=bidirectional, vocab_size=199, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=64, initializer_range=0.2, architectures=["Gemma3ForCausalLM"])
    hf = Gemma3ForCausalLM(config).eval()
    model = TransformerBridge.boot_transformers("google/gemma-3-1b-pt", hf_model=hf, tokenizer=toy[0].tokenizer, device="cpu").eval()
    tokens = torch.randint(1, 199, (2, 2, 9))
    even = tlnp.PromptPairs(tokens[0], tokens[1], torch.tensor([1, 2]), torch.tensor([3, 4]))
    padded = replace(even, attention_mask=torch.arange(9) < torch.tensor([[5], [9]]), answer_positions=None)
    circuit = tlnp.Circuit.empty(find_nodes(model).restrict(("head",)))
    assert tlnp.evaluate(model, circuit, even).kl > 0
    if bidirectional:
        with pytest.raises(ValueError, match="the prompts have padding, and attention in this model is not causal"):
            tlnp.evaluate(model, circuit, padded)
    else:
        assert tlnp.evaluate(model, circuit, padded).kl > 0


@pytest.mark.parametrize("index", [True, torch.tensor(True)])
def test_true_is_no_index(toy: Toy, index: Any) -> None:
    with pytest.raises(TypeError, match="index=.*give a number, a slice"):
        toy[1][index]
