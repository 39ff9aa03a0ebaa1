"""Strings as the model's tokens: a pair of prompts, the answers after it, and words for tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

LONG_ANSWERS = ("raise", "first")


@dataclass(frozen=True)
class Pair:
    """The tokens of one pair; answers and wrong answers are one token each."""

    clean: list[int]
    corrupted: list[int]
    answers: list[int]
    wrong_answers: list[int]


def checked_text(value: Any, name: str, *, several: bool) -> Any:
    """A string, or where several may be right a list of strings. Raises TypeError; ValueError for half of a surrogate pair, which is no
    character."""
    texts = value if isinstance(value, (list, tuple)) and several else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a string{' or a list of strings' if several else ''}, got {value!r}")
    for text in texts:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"{name} holds half of a surrogate pair, {text!r}; write the whole character, or its escapes together.")
    return value


def read_pairs(model: Any, clean: Sequence[str], corrupted: Sequence[str], answers: Sequence[str | Sequence[str]],
               wrong_answers: Sequence[str | Sequence[str]], long_answers: str) -> list[Pair | str]:
    """Each pair's tokens, or why it has none. long_answers: as in `PromptPairs.from_strings`."""
    texts = [([a] if isinstance(a, str) else list(a), [w] if isinstance(w, str) else list(w))
             for a, w in zip(answers, wrong_answers, strict=True)]
    asked = [(prompt, text) for prompt, both in zip(clean, texts, strict=True) for side in both for text in side]
    found = iter(continuations(model, asked))
    last = dict(zip(clean, model.tokenizer(list(clean), add_special_tokens=False)["input_ids"], strict=True))
    pairs: list[Pair | str] = []
    for c, d, (right, wrong) in zip(clean, corrupted, texts, strict=True):
        tails = [{text: next(found) for text in side} for side in (right, wrong)]
        try:
            pairs.append(_read(model, c, d, list(last[c]), tails[0], tails[1], long_answers))
        except ValueError as error:
            pairs.append(str(error))
    return pairs


def _read(model: Any, clean: str, corrupted: str, end: list[int], right: dict[str, list[int]], wrong: dict[str, list[int]],
          long_answers: str) -> Pair:
    ids, others = (model.to_tokens(text, truncate=False)[0].tolist() for text in (clean, corrupted))
    if len(ids) != len(others):
        raise ValueError(f"clean has {len(ids)} tokens and corrupted {len(others)}; they must align token by token.\n"
                         f"  clean:     {clean!r}\n  corrupted: {corrupted!r}")
    if ids[len(ids) - len(end):] != end:
        raise ValueError(f"this tokenizer ends the prompt {clean!r} with {model.tokenizer.decode(ids[-1:])!r}, and the answer would be "
                         "read after that. Switch that off in the tokenizer, or build PromptPairs from token ids.")
    for text, tail in (right | wrong).items():
        _check_tail(model, clean, text, tail, long_answers)
    tails, shared = [*right.values(), *wrong.values()], 0
    while shared < min(map(len, tails)) - 1 and all(tail[shared] == tails[0][shared] for tail in tails):
        shared += 1
    answers, wrong_answers = (list(dict.fromkeys(tail[shared] for tail in side.values())) for side in (right, wrong))
    if set(answers) & set(wrong_answers):
        raise ValueError(f"the answer and the wrong answer share a token ({', '.join(map(repr, right))} and "
                         f"{', '.join(map(repr, wrong))}); they must differ.")
    head = tails[0][:shared]
    if len(ids) + shared > (n_ctx := int(getattr(model.cfg, "n_ctx", 0) or 1 << 30)):
        raise ValueError(f"the prompts have {len(ids) + shared} tokens, but the model's context is {n_ctx}.")
    return Pair(ids + head, others + head, answers, wrong_answers)


def _check_tail(model: Any, prompt: str, text: str, tail: list[int], long_answers: str) -> None:
    """Raises ValueError where a text is not known tokens after its prompt, as many as it may have."""
    if not tail and prompt != prompt.rstrip():
        raise ValueError(f"the prompt ends in a space, {prompt[-20:]!r}, and with the answer {text!r} it is read as other tokens; end the "
                         "prompt without the space and begin the answer with it.")
    if not tail:
        raise ValueError(f"the answer {text!r} is not a token of its own after {prompt[-20:]!r}: together they are read as other tokens. "
                         "Is a leading space missing, or one too many? Otherwise choose other words.")
    if len(tail) > 1 and long_answers == "raise":
        words = ", ".join(repr(model.tokenizer.decode([token])) for token in tail)
        raise ValueError(f"the answer {text!r} is {len(tail)} tokens ({words}); an answer is one token. Is a leading space missing, or one "
                         'too many? Otherwise choose other words, or give long_answers="first": the first token in which answer and wrong '
                         "answer differ stands for them.")
    if any(is_unknown(model, token, text) for token in tail):
        raise ValueError(f"the answer {text!r} is not in the model's vocabulary; choose other words.")


def continuations(model: Any, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
    """The tokens of each text after its prompt: those that `prompt + text` has beyond the prompt's; none where the two together are read
    in another way.

    A tokenizer that puts a space before every text by itself (Llama 2) has one token for "Mary" where it has one for " Mary".
    """
    encode = partial(model.tokenizer, add_special_tokens=False)
    texts = list(dict.fromkeys(part for prompt, text in pairs for part in (prompt, prompt + text, prompt + " " + text, text)))
    ids = dict(zip(texts, map(list, encode(texts)["input_ids"]), strict=True)) if texts else {}

    def beyond(prompt: str, text: str) -> list[int]:
        before, whole = ids[prompt], ids[prompt + text]
        return whole[len(before):] if whole[:len(before)] == before else []

    found = []
    for prompt, text in pairs:
        tail, spaced = beyond(prompt, text), [] if prompt.endswith(" ") else beyond(prompt, " " + text)
        found.append(spaced if len(tail) != 1 and len(spaced) == 1 and spaced == ids[text] else tail)
    return found


def is_unknown(model: Any, token: int, text: str) -> bool:
    """Whether a token is the tokenizer's word for a text that it does not know."""
    return token == getattr(model.tokenizer, "unk_token_id", None) and text.strip() != model.tokenizer.unk_token


def words_of(tokenizer: Any, tokens: Iterable[int], after: int) -> dict[int, str]:
    """Each token as the text that it adds behind another one; with the space, if it has one."""
    before = tokenizer.decode([after], clean_up_tokenization_spaces=False)
    both = {token: tokenizer.decode([after, token], clean_up_tokenization_spaces=False) for token in tokens}
    return {token: text[len(before):] if text.startswith(before) else text for token, text in both.items()}


def as_text(tokens: Sequence[int], words: Mapping[int, str], marked: Sequence[bool] = ()) -> str:
    """Tokens as one text, runs of those that are marked in brackets; as numbers where there are no words for them."""
    texts = [(words.get(token) or f" {token}") if words else f" {token}" for token in tokens]
    runs = groupby(zip(marked or [False] * len(texts), texts, strict=True), key=lambda pair: pair[0])
    parts = [(mark, "".join(text for _, text in run)) for mark, run in runs]
    shown = [f"{text[:len(text) - len(text.lstrip())]}[{text.lstrip()}]" if mark else text for mark, text in parts]
    return "".join(shown).strip().replace("\n", "\\n")
