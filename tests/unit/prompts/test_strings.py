"""Strings as tokens, with tokenizers of every kind made here: what an answer is after its prompt, and how prompts print."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import tl_nodeprune as tlnp
from tl_nodeprune.prompts import tasks

Toy = tuple[Any, tlnp.PromptPairs]
SPECIAL = ["<unk>", "<s>", "</s>", "[SEP]"]


def texts() -> list[str]:
    rng, words = random.Random(0), tasks.Words()
    rows = [make(rng, words) for make in (tasks.ioi_row, tasks.pronoun_row) for _ in range(600)]
    return [text for row in rows for text in (row[0] + row[2], row[0] + row[3], row[1])]


def metaspace(model: Any, scheme: str) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return tokenizer


def llama() -> Tokenizer:
    """As Llama 2's: the space before a text comes from the normalizer, and bytes stand for what is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    return trained(tokenizer, trainers.BpeTrainer(vocab_size=900, special_tokens=SPECIAL, show_progress=False))


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return trained(tokenizer, trainers.BpeTrainer(vocab_size=900, special_tokens=SPECIAL, show_progress=False,
                                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return trained(tokenizer, trainers.WordPieceTrainer(vocab_size=900, special_tokens=SPECIAL, show_progress=False))


def trained(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def bpe(scheme: str) -> Tokenizer:
    return trained(metaspace(models.BPE(unk_token="<unk>"), scheme),
                   trainers.BpeTrainer(vocab_size=900, special_tokens=SPECIAL, show_progress=False))


def unigram(scheme: str) -> Tokenizer:
    """All words and letters of the texts; a word is likelier than its letters."""
    words = sorted({word for text in texts() for word in re.findall(r"[\w']+|[^\w\s]", text)})
    letters = sorted({letter for word in words for letter in word} | {"\u2581"})
    pieces = dict.fromkeys(SPECIAL, 0.0) | {f"\u2581{word}": -6.0 for word in words} | {letter: -9.0 for letter in letters}
    return metaspace(models.Unigram(list(pieces.items()), unk_id=0), scheme)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "llama": llama, "byte level": byte_level, "word piece": word_piece,
    **{f"{name} {scheme}": lambda make=make, scheme=scheme: make(scheme)  # type: ignore[misc]
       for name, make in (("bpe", bpe), ("unigram", unigram)) for scheme in ("always", "first", "never")}}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random model with a tokenizer of that kind, which puts a start token before each text."""
    return with_tokenizer(KINDS[request.param](), tmp_path_factory.mktemp("tokenizer"))


def with_tokenizer(tokenizer: Tokenizer, folder: Path) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
                            ).save_pretrained(folder)
    read = PreTrainedTokenizerFast.from_pretrained(folder)
    hf = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=48, vocab_size=len(read)))
    return TransformerBridge.boot_transformers("gpt2", hf_model=hf, tokenizer=read, device="cpu").eval()


@pytest.mark.parametrize("task", ["ioi", "gendered_pronoun"])
def test_an_answer_is_what_comes_after_the_prompt(model: Any, task: str) -> None:
    """Prompt and answer together read as the prompt's tokens and then the answer's; with the tokenizer as the oracle."""
    rng, words = random.Random(1), tasks.usable(task, model)
    assert len(words.names) >= 20
    rows = [tasks.ROWS[task](rng, words) for _ in range(20)]
    prompts = tlnp.PromptPairs.from_strings(model, *map(list, zip(*rows, strict=True)))
    for (clean, _, right, wrong), one in zip(rows, map(prompts.__getitem__, range(20)), strict=True):
        real = one.clean[one.attention_mask].tolist()
        assert real[0] == 1 and real[1:] == model.tokenizer.encode(clean, add_special_tokens=False)
        for text, token in ((right, one.answers), (wrong, one.wrong_answers)):
            assert real[1:] + token.tolist() == model.tokenizer.encode(clean + text, add_special_tokens=False)
            assert model.tokenizer.decode(token).strip() == text.strip()
    assert torch.equal(tlnp.tasks.make(task, model, 5, 3).answers, tlnp.tasks.make(task, model, 5, 3).answers)


def test_prompts_print_as_text(model: Any) -> None:
    clean, corrupted = "So Mary is a really good friend, isn't", "So John is a really good friend, isn't"
    prompts = tlnp.PromptPairs.from_strings(model, [clean], [corrupted], [" she"], [" he"])
    plain = lambda text: re.sub(r"<s>|[\s\[\]]", "", text)  # noqa: E731
    lines = repr(prompts).split("\n")
    assert lines[0].startswith("PromptPairs: 1 pair of ") and "answer:    she, not he" in lines[3]
    assert plain(lines[1].split(":", 1)[1]) == plain(clean) and plain(lines[2].split(":", 1)[1]) == plain(corrupted)
    assert " [Mary] is a really good" in lines[1] and " [John] is a" in lines[2]


def test_answers_of_several_tokens(model: Any) -> None:
    read = lambda *answers, **options: tlnp.PromptPairs.from_strings(  # noqa: E731
        model, ["So Mary is a"], ["So John is a"], *([answer] for answer in answers), **options)
    with pytest.raises(ValueError, match=r"prompt 0: the answer ' Mary Susan' is \d tokens .*long_answers=\"first\""):
        read(" Mary Susan", " Mary Tom")
    one, first = read(" Susan", " Tom"), read(" Mary Susan", " Mary Tom", long_answers="first")
    assert first.answers.tolist() == one.answers.tolist() and first.wrong_answers.tolist() == one.wrong_answers.tolist()
    for side, start in ((first.clean, "So Mary is a Mary"), (first.corrupted, "So John is a Mary")):
        assert side[0, 1:].tolist() == model.tokenizer.encode(start, add_special_tokens=False)
    assert read(" Susan Mary", " Tom Mary", long_answers="first").answers.tolist() == one.answers.tolist()
    assert read([" Susan Mary", " Susan Tom"], " Tom", long_answers="first").answers.tolist() == one.answers.tolist()
    for same in (" Mary Susan", " Mary"):
        with pytest.raises(ValueError, match="they must differ"):
            read(same, " Mary Susan", long_answers="first")


def test_what_is_no_continuation_is_refused(model: Any) -> None:
    read = lambda clean, answer: tlnp.PromptPairs.from_strings(model, [clean], [clean], [answer], [" he"])  # noqa: E731
    with pytest.raises(ValueError, match="prompt 0: the answer '' is not a token of its own after 'So Mary is a'"):
        read("So Mary is a", "")
    encode = lambda text: model.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    if encode("So Mary is ") == encode("So Mary is"):  # spaces are dropped
        assert read("So Mary is ", "she").answers.tolist() == encode("she")
    else:
        with pytest.raises(ValueError, match="prompt 0: (the prompt ends in a space|the answer 'she' is 2 tokens)"):
            read("So Mary is ", "she")


def test_a_tokenizer_that_ends_each_prompt_with_a_token_is_refused(tmp_path: Path) -> None:
    model = with_tokenizer(word_piece(), tmp_path)
    model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A [SEP]", special_tokens=[("<s>", 1), ("[SEP]", 3)])
    with pytest.raises(ValueError, match="this tokenizer ends the prompt 'So Mary is' with '.SEP."):
        tlnp.PromptPairs.from_strings(model, ["So Mary is"], ["So John is"], [" she"], [" he"])


FRIEND = "So {} is a really good friend, isn't"


def test_pairs_that_cannot_be_read_are_named_and_skipped(toy: Toy) -> None:
    names = ["Mary", "Tom", "Tom and Mary", "Anna", "Lisa", "Peter"]
    answers: list[Any] = [" she", " he", " he", " dragon", " she", [" he", " Mary John"]]
    wrong = [" he", " she", " she", " he", " she", " she"]
    read = lambda **options: tlnp.PromptPairs.from_strings(  # noqa: E731
        toy[0], [FRIEND.format(name) for name in names], [FRIEND.format("John")] * 6, answers, wrong, **options)
    with pytest.raises(ValueError, match="prompt 2: clean has 12 tokens and corrupted 10"):
        read()
    with pytest.warns(UserWarning) as caught:
        prompts = read(on_error="skip")
    said = str(caught[0].message)
    assert said.startswith("4 of 6 pairs were left out") and caught[0].filename == __file__
    for line in ("prompt 2: clean has 12", "prompt 3: the answer ' dragon'", "prompt 4: .*must differ", "prompt 5: the answer ' Mary Jo"):
        assert re.search(line, said)
    assert prompts.indices.tolist() == [0, 1] and prompts[1].indices.tolist() == [1]
    answers[:] = [" dragon"] * 6
    with pytest.raises(ValueError, match="no pair can be read; prompt 0"):
        read(on_error="skip")
    with pytest.raises(ValueError, match="on_error='ignore'; allowed: raise, skip"):
        read(on_error="ignore")
    with pytest.raises(ValueError, match="long_answers='x'; allowed: raise, first"):
        read(long_answers="x")


def test_a_prompt_beyond_the_context_is_skipped_too(toy: Toy) -> None:
    with pytest.warns(UserWarning, match="prompt 1: the prompts have 41 tokens, but the model's context is 32"):
        prompts = tlnp.PromptPairs.from_strings(toy[0], ["Mary", "Mary " * 40], ["John", "John " * 40], [" she"] * 2, [" he"] * 2,
                                                on_error="skip")
    assert prompts.indices.tolist() == [0]


def test_indices_go_along(toy: Toy) -> None:
    prompts = toy[1]
    first, second = prompts.split(0.5, seed=0)
    assert sorted([*first.indices.tolist(), *second.indices.tolist()]) == list(range(24))
    assert torch.equal(prompts.clean[first.indices], first.clean) and torch.equal(second[2:4].to("cpu").indices, second.indices[2:4])
    again = prompts.without_repeats()
    assert torch.equal(prompts.clean[again.indices], again.clean)


def test_show_prints_a_table(toy: Toy, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    prompts = toy[1]
    prompts.show(2)
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("clean", "corrupted", "wrong answer", "[", "<s>")) and shown.count("<s>") == 4
    prompts[[3]].show(99)
    assert re.search(r"│ 3 ", capsys.readouterr().out)
    with pytest.raises(ValueError, match="n=0"):
        prompts.show(0)
    tokens = tlnp.PromptPairs(torch.tensor([[5, 6]]), torch.tensor([[5, 7]]), torch.tensor([1]), torch.tensor([2]))
    assert "clean:     5 [6]\n  corrupted: 5 [7]\n  answer:    1, not 2" in repr(tokens)
