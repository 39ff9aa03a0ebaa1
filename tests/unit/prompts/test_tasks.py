"""The three tasks as prompts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import tl_nodeprune as tlnp
from tl_nodeprune.prompts import tasks

Toy = tuple[Any, tlnp.PromptPairs]


@pytest.mark.parametrize("task", ["ioi", "gendered_pronoun", "greater_than"])
def test_same_seed_same_prompts_and_the_model_knows_them(toy: Toy, task: str) -> None:
    model, _ = toy
    a, b, c = (getattr(tlnp.tasks, task)(model, n=12, seed=seed) for seed in (1, 1, 2))
    assert len(a) == 12 and torch.equal(a.clean, b.clean) and torch.equal(a.answers, b.answers)
    assert a.clean.shape != c.clean.shape or not torch.equal(a.clean, c.clean)
    assert len(a.correct(model)) >= 10
    a.check_fits(model)


def test_greater_than_has_all_later_years_right(toy: Toy) -> None:
    model, _ = toy
    p = tlnp.tasks.greater_than(model, n=5, seed=0)
    words = model.to_str_tokens(p.clean[0][p.attention_mask[0]])  # type: ignore[index]
    start = int(words[words.index("year") + 2])
    right = sorted(int(model.tokenizer.decode(i)) for i in p.answers[0].tolist() if i >= 0)
    wrong = sorted(int(model.tokenizer.decode(i)) for i in p.wrong_answers[0].tolist() if i >= 0)
    assert right == list(range(start + 1, 100)) and wrong == list(range(2, start + 1))


def test_errors(toy: Toy) -> None:
    model, _ = toy
    with pytest.raises(ValueError, match="unknown task 'chess'; allowed: ioi"):
        tlnp.tasks.make("chess", model, 1, 0)
    with pytest.raises(ValueError, match="n=0"):
        tlnp.tasks.ioi(model, n=0, seed=0)
    with pytest.raises(ValueError, match="unknown task 'chess'"):
        tlnp.toy.load("chess")
    with pytest.raises(ValueError, match="unknown model_class 'Other'"):
        tlnp.toy.load(model_class="Other")


def llama_like(words: list[str], folder: Path, unk: str = "<unk>") -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space before every text, as Llama 2's: " Mary" alone is two tokens, after a prompt one."""
    vocabulary = {word: i for i, word in enumerate(["<s>", unk, "\u2581", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unk))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token=unk, pad_token="<s>").save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def test_a_tokenizer_that_puts_a_space_before_every_text(fresh_toy: Toy, tmp_path: Path) -> None:
    model, _ = fresh_toy
    texts = [text for rng in [random.Random(0)] for _ in range(300) for text in tasks.ioi_row(rng, tasks.Words())[:2]]
    names = {f"\u2581{name}" for name in tasks.FEMALE + tasks.MALE}
    words = sorted({f"\u2581{word}" for text in texts for word in text.split(" ")} | names)
    model.tokenizer = llama_like(words, tmp_path)
    assert len(model.tokenizer.encode(" Mary", add_special_tokens=False)) == 2
    prompts = tlnp.tasks.ioi(model, n=20, seed=0)
    for tokens in (prompts.answers, prompts.wrong_answers):
        assert set(model.tokenizer.convert_ids_to_tokens(tokens.tolist())) <= names
    built = tlnp.PromptPairs.from_strings(model, ["When Mary and John"], ["When Anna and Tom"], [" gave"], ["Mary"])
    assert model.tokenizer.convert_ids_to_tokens([*built.answers, *built.wrong_answers]) == ["\u2581gave", "\u2581Mary"]
    with pytest.raises(ValueError, match="the answer ' Zoe' is not in the model's vocabulary"):
        tlnp.PromptPairs.from_strings(model, ["When Mary and John"], ["When Anna and Tom"], [" Zoe"], [" Mary"])
