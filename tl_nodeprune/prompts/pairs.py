"""Prompts in pairs: clean and corrupted, with the answers that tell them apart."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor

from tl_nodeprune.nodes import (
    answer_logits,
    check_causal,
    check_counts,
    check_device,
    check_finite,
    check_ready,
    check_seed,
    check_types,
    device_of,
    inactive,
    reraise_memory,
)
from tl_nodeprune.prompts.checks import FILL, check_answers, check_mask, check_positions, check_tokens
from tl_nodeprune.prompts.strings import LONG_ANSWERS, Pair, as_text, checked_text, read_pairs, words_of

_ANSWERS = 3  # that a printed pair shows, at most


@dataclass(frozen=True, eq=False, repr=False)
class PromptPairs:
    """Clean prompts, corrupted prompts of the same shape, and the next tokens to tell apart.

    clean, corrupted: [batch pos] token ids.
    answers, wrong_answers: [batch], or [batch k] where several tokens are right; rows with fewer are filled with -1.
    attention_mask: [batch pos], 1 at real tokens of both clean and corrupted; None: no padding. Left-padded prompts are
        shifted to the left edge here (causal models then need no mask at all, nor do TransformerLens' own tools).
    answer_positions: [batch], where the answer is predicted, as an index into `clean` as given; None: at the last real token.

    Raises: ValueError for anything that does not fit together.
    """

    clean: Int[Tensor, "batch pos"]
    corrupted: Int[Tensor, "batch pos"]
    answers: Int[Tensor, "batch"] | Int[Tensor, "batch k"]
    wrong_answers: Int[Tensor, "batch"] | Int[Tensor, "batch k"]
    attention_mask: Bool[Tensor, "batch pos"] | None = None
    answer_positions: Int[Tensor, "batch"] | None = None

    def __post_init__(self) -> None:
        check_tokens(self.clean, self.corrupted)
        check_answers(self.clean, self.answers, self.wrong_answers)
        mask = check_mask(self.clean, self.attention_mask)
        positions = mask.shape[1] - 1 - mask.flip(1).long().argmax(1) if self.answer_positions is None else self.answer_positions
        check_positions(positions, mask)
        shift = mask.long().argmax(1)
        order = (torch.arange(mask.shape[1], device=mask.device) + shift[:, None]) % mask.shape[1]
        for name, value in (("clean", self.clean.long()), ("corrupted", self.corrupted.long()), ("attention_mask", mask)):
            object.__setattr__(self, name, value.gather(1, order))
        for name, value in (("answers", self.answers), ("wrong_answers", self.wrong_answers),
                            ("answer_positions", positions.long() - shift)):
            object.__setattr__(self, name, value.long())
        self._carry(torch.arange(len(mask)), {})

    def _carry(self, indices: Tensor, words: dict[int, str]) -> PromptPairs:
        """What goes along with the prompts, and is no field: a copy of the fields alone is the same prompts. words: of the tokens."""
        self.__dict__.update(_indices=indices, _words=words)
        return self

    @property
    def indices(self) -> Int[Tensor, "batch"]:
        """Where each pair stood in what the first of these prompts were made of, lists or tensors, through all indexing and splitting."""
        return cast(Tensor, self.__dict__["_indices"])

    @property
    def _words(self) -> dict[int, str]:
        return cast("dict[int, str]", self.__dict__["_words"])

    @classmethod
    def from_strings(
        cls, model: Any, clean: Sequence[str], corrupted: Sequence[str], answers: Sequence[str | Sequence[str]],
        wrong_answers: Sequence[str | Sequence[str]], *, on_error: str = "raise", long_answers: str = "raise",
    ) -> PromptPairs:
        """Tokenise with the model's tokenizer; prompts of several lengths are padded on the right.

        answers, wrong_answers: a string each, or a list of strings where several are right; every one a single token, what
            `prompt + answer` has beyond the clean prompt (mind the leading space: " Mary").
        on_error: "raise", or "skip": leave out pairs that cannot be read, with a warning that says which and why; `indices` of the prompts
            says which pairs they are.
        long_answers: "raise", or "first": of answers of several tokens the first token in which answer and wrong answer differ stands for
            them; tokens that they share before it are put at the end of both prompts. That is not the probability of the whole answer.

        Raises: ValueError where a pair differs in token length, an answer is not one known token, a prompt is longer than the
            model's context, or the model has no tokenizer; TypeError where a text is no string.
        """
        check_types(PromptPairs.from_strings, locals())
        for name, word, allowed in (("on_error", on_error, ("raise", "skip")), ("long_answers", long_answers, LONG_ANSWERS)):
            if word not in allowed:
                raise ValueError(f"{name}={word!r}; allowed: {', '.join(allowed)}.")
        lists = {"clean": clean, "corrupted": corrupted, "answers": answers, "wrong_answers": wrong_answers}
        if len({len(v) for v in lists.values()}) != 1 or not len(clean):
            raise ValueError(f"from_strings needs lists of one equal length above 0; got {({k: len(v) for k, v in lists.items()})}.")
        if getattr(model, "tokenizer", None) is None:
            raise ValueError("the model has no tokenizer to read strings with; build PromptPairs from token ids instead.")
        for name, values in lists.items():
            for value in values:
                checked_text(value, name, several="answers" in name)
        found = read_pairs(model, clean, corrupted, answers, wrong_answers, long_answers)
        bad = {i: pair for i, pair in enumerate(found) if isinstance(pair, str)}
        if bad and (on_error == "raise" or len(bad) == len(found)):
            none = "no pair can be read; " if on_error == "skip" else ""
            raise ValueError(f"{none}prompt {next(iter(bad))}: {next(iter(bad.values()))}")
        if bad:
            told = "\n".join(f"prompt {i}: {why}" for i, why in list(bad.items())[:8])
            more = f"\nand {len(bad) - 8} more" if len(bad) > 8 else ""
            warnings.warn(f"{len(bad)} of {len(found)} pairs were left out:\n{told}{more}", stacklevel=2)
        good = {i: pair for i, pair in enumerate(found) if isinstance(pair, Pair)}
        prompts = _padded(list(good.values())).to(device_of(model))
        prompts.check_fits(model)
        tokens = {token for pair in good.values() for part in vars(pair).values() for token in part}
        return prompts._carry(torch.tensor(list(good)), words_of(model.tokenizer, tokens, next(iter(good.values())).answers[0]))

    @classmethod
    def from_jsonl(cls, model: Any, path: str | Path, *, on_error: str = "raise", long_answers: str = "raise") -> PromptPairs:
        """From a file with one JSON object a line: {"clean": str, "corrupted": str, "answer": str, "wrong": str}; answers may be lists.

        on_error, long_answers: as in `from_strings`; a line that is no such object is an error in any case.

        Raises: ValueError with the line's number for what is no such object, and what `from_strings` raises; OSError for no file.
        """
        check_types(PromptPairs.from_jsonl, locals())
        return cls.from_strings(model, *read_rows(path).values(), on_error=on_error, long_answers=long_answers)

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> PromptPairs:
        """Some of the prompts; a single index gives a batch of one."""
        if isinstance(index, int) and not isinstance(index, bool):
            if not -len(self) <= index < len(self):
                raise IndexError(f"prompt {index} does not exist; there are {len(self)}.")
            index = [index]
        if isinstance(index, bool) or isinstance(index, Tensor) and index.dtype == torch.bool and not index.ndim:
            raise TypeError(f"index={index!r}; give a number, a slice, several numbers, or {len(self)} of True and False.")
        try:
            chosen = index if isinstance(index, slice) else torch.as_tensor(index).cpu()
            rows = torch.arange(len(self))[chosen if isinstance(chosen, slice) or chosen.numel() else slice(0)].reshape(-1)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            reraise_memory(error)
            kind = IndexError if isinstance(error, IndexError) else TypeError
            raise kind(f"index={index!r}; give a number, a slice, several numbers, or {len(self)} of True and False: {error}") from error
        if not len(rows):
            raise ValueError(f"no prompt left of {len(self)} by indexing with {index!r}; PromptPairs holds one or more.")
        taken, rows = object.__new__(PromptPairs), rows.to(self.clean.device)
        for f in fields(self):  # past the checks, which these prompts have stood
            object.__setattr__(taken, f.name, getattr(self, f.name)[rows])
        return taken._carry(self.indices[rows.cpu()], self._words)

    def __repr__(self) -> str:
        n, lengths = len(self), self.attention_mask.sum(1)  # type: ignore[union-attr]
        low, high = int(lengths.min()), int(lengths.max())
        clean, corrupted, right, wrong = self._row(0)
        return (f"PromptPairs: {n} pair{'s' * (n > 1)} of {low if low == high else f'{low} to {high}'} tokens; "
                f"{'the first, ' if n > 1 else ''}differences in [brackets]:\n"
                f"  clean:     {clean}\n  corrupted: {corrupted}\n  answer:    {right}, not {wrong}")

    def show(self, n: int = 5) -> None:
        """Print the first `n` pairs as a table: clean and corrupted prompt, their differences in brackets, answer and wrong answer."""
        check_types(PromptPairs.show, locals())
        check_counts(n=n)
        table = Table(*(Column(name, overflow="fold") for name in ("", "clean", "corrupted", "answer", "wrong answer")), show_lines=True)
        for row in range(min(n, len(self))):
            table.add_row(*(Text(cell) for cell in (str(int(self.indices[row])), *self._row(row))))
        Console().print(table)

    def _row(self, row: int) -> tuple[str, str, str, str]:
        """One pair in words, as far as the tokens have words."""
        real = self.attention_mask[row]  # type: ignore[index]
        clean, corrupted = self.clean[row][real].tolist(), self.corrupted[row][real].tolist()
        differ = [a != b for a, b in zip(clean, corrupted, strict=True)]
        answers = [[as_text([token], self._words) for token in side[row].reshape(-1).tolist() if token != FILL]
                   for side in (self.answers, self.wrong_answers)]
        right, wrong = (", ".join(some[:_ANSWERS]) + (f", … ({len(some)})" if len(some) > _ANSWERS else "") for some in answers)
        return as_text(clean, self._words, differ), as_text(corrupted, self._words, differ), right, wrong

    def batches(self, batch_size: int) -> Iterator[PromptPairs]:
        """The prompts in order, at most `batch_size` at a time. Raises: ValueError for a batch_size below 1."""
        check_types(PromptPairs.batches, locals())
        check_counts(batch_size=batch_size)
        return (self[start:start + batch_size] for start in range(0, len(self), batch_size))

    def to(self, device: torch.device | str) -> PromptPairs:
        """The same prompts on another device. Raises: ValueError for one that cannot be used here."""
        check_types(PromptPairs.to, locals())
        check_device("device", device)
        moved = PromptPairs(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})
        return moved._carry(self.indices, self._words)

    def split(self, share: float, seed: int) -> tuple[PromptPairs, PromptPairs]:
        """Two disjoint sets at random, the first with `share` of the different clean prompts (at least one in each). Pairs with the same
        clean prompt stay together, so that nothing held out was searched on.

        Raises: ValueError for a share that is not between 0 and 1, or fewer than 2 different clean prompts.
        """
        check_types(PromptPairs.split, locals())
        check_seed(seed)
        which = self.distinct()
        n = int(which.max()) + 1
        if not 0 < share < 1 or n < 2:
            raise ValueError(f"split needs 0 < share < 1 and 2 different clean prompts or more; got share={share} and {n}.")
        place = torch.randperm(n, generator=torch.Generator().manual_seed(int(seed))).argsort()[which]
        cut = min(max(round(share * n), 1), n - 1)
        order = place.argsort(stable=True)
        return self[order[place[order] < cut]], self[order[place[order] >= cut]]

    def distinct(self) -> Int[Tensor, "batch"]:
        """Which clean prompt each pair has, numbered by first appearance: its real tokens, and where the answer is read."""
        assert self.attention_mask is not None and self.answer_positions is not None
        tokens = map(tuple, self.clean.masked_fill(~self.attention_mask, -1).tolist())
        rows = list(zip(tokens, self.answer_positions.tolist(), strict=True))
        number = {row: i for i, row in enumerate(dict.fromkeys(rows))}
        return torch.tensor([number[row] for row in rows])

    def without_repeats(self) -> PromptPairs:
        """The first pair of each different clean prompt."""
        which = self.distinct().tolist()
        return self[[which.index(i) for i in range(max(which) + 1)]]

    @property
    def reach(self) -> int:
        """Positions up to the last one that is not padding in some prompt."""
        assert self.attention_mask is not None
        return int(self.attention_mask.any(0).nonzero().max()) + 1

    @property
    def n_same(self) -> int:
        """How many corrupted prompts are the same as their clean ones."""
        return int((self.clean == self.corrupted).all(1).sum())

    @property
    def has_corrupted(self) -> bool:
        """Whether any corrupted prompt is not the clean one."""
        return self.n_same < len(self)

    def check_corrupted(self, ablation: str) -> None:
        """Raises ValueError where the ablation is "interchange" and there are no corrupted prompts."""
        check_types(PromptPairs.check_corrupted, locals())
        if ablation == "interchange" and not self.has_corrupted:
            raise ValueError("corrupted prompts are missing: all are the same as the clean ones, so interchange ablation replaces nothing. "
                             "Give corrupted prompts, or take mean, zero or optimal ablation.")

    def correct(self, model: Any, *, batch_size: int = 64) -> PromptPairs:
        """Those prompts that the full model answers right, whatever is attached to it now: answer logit > wrong logit.

        Raises: ValueError where it answers none; FloatingPointError for NaN or inf logits; RuntimeError in training mode with dropout.
        """
        check_types(PromptPairs.correct, locals())
        check_ready(model)
        right = torch.cat([batch.logit_diff(_logits(model, batch)) > 0 for batch in self.batches(batch_size)])
        if not right.any():
            raise ValueError(f"the model answers none of the {len(self)} prompts right; is the tokenizer, the task or the model another's?")
        return self[right.nonzero()[:, 0]]

    def logit_diff(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, "batch"]:
        """Answer logit - wrong logit at the answer positions; for several answers, log-sum-exp over each side.

        With p the model's probabilities this is `log(p(answers) / p(wrong answers))`.

        Raises: FloatingPointError where it is NaN or inf, unless gradients are on; ValueError for logits of another shape.
        """
        check_types(PromptPairs.logit_diff, locals())
        wrong = f"logits are {tuple(logits.shape)}; they must be [batch d_vocab], for these {len(self)} prompts, with all of their answers."
        if logits.ndim != 2 or len(logits) != len(self):
            raise ValueError(wrong)
        try:
            difference = _pooled(logits, self.answers) - _pooled(logits, self.wrong_answers)
        except RuntimeError as error:  # asked before, the largest answer would be a look from the host at every step
            reraise_memory(error)
            raise ValueError(f"{wrong} {error}") from error
        if not torch.is_grad_enabled():
            check_finite(difference, "the logit difference")
        return difference

    def check_fits(self, model: Any, name: str = "prompts") -> None:
        """Raises ValueError where a token id is outside the model's vocabulary, the prompts are longer than its context, or they have
        padding and its attention is not causal. name: what they are called in it."""
        check_types(PromptPairs.check_fits, locals())
        size = int(model.cfg.d_vocab)
        for field in ("clean", "corrupted", "answers", "wrong_answers"):
            top = int(getattr(self, field).max())
            if top >= size:
                raise ValueError(f"{name}: {field} holds token id {top}, but the model's vocabulary ends at {size - 1}; "
                                 "were the prompts made with another tokenizer?")
        if self.clean.shape[1] > (n_ctx := int(getattr(model.cfg, "n_ctx", 0) or 1 << 30)):
            raise ValueError(f"{name} have {self.clean.shape[1]} tokens, but the model's context is {n_ctx}.")
        assert self.attention_mask is not None
        check_causal(model, self.attention_mask)


def read_rows(path: str | Path) -> dict[str, list[Any]]:
    """The columns of a file for `from_jsonl`, as texts. Raises what that says of the file."""
    columns: dict[str, list[Any]] = {"clean": [], "corrupted": [], "answer": [], "wrong": []}
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            for name, column in columns.items():
                column.append(checked_text(row[name], name, several=name in ("answer", "wrong")))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: expected a JSON object with the keys {', '.join(columns)}; "
                             f"{type(error).__name__}: {error}") from error
    if not columns["clean"]:
        raise ValueError(f"{path} holds no prompt; expected one JSON object a line with the keys {', '.join(columns)}.")
    return columns


def check_pairs(given: object, name: str = "prompts") -> None:
    """Raises TypeError for what is not a PromptPairs."""
    if not isinstance(given, PromptPairs):
        raise TypeError(f"{name} must be PromptPairs, got {type(given).__name__}; see PromptPairs.from_strings.")


def positions(prompts: PromptPairs) -> Tensor:
    """The answer positions [batch], which PromptPairs always fills in."""
    assert prompts.answer_positions is not None
    return prompts.answer_positions


def _padded(pairs: Sequence[Pair]) -> PromptPairs:
    def table(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        width = max(map(len, rows))
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])

    clean, corrupted = table([pair.clean for pair in pairs], 0), table([pair.corrupted for pair in pairs], 0)
    right, wrong = (side[:, 0] if side.shape[1] == 1 else side for side in (
        table([pair.answers for pair in pairs], FILL), table([pair.wrong_answers for pair in pairs], FILL)))
    real = torch.arange(clean.shape[1]) < torch.tensor([[len(pair.clean)] for pair in pairs])
    return PromptPairs(clean, corrupted, right, wrong, real)


def _logits(model: Any, prompts: PromptPairs) -> Tensor:
    prompts.check_fits(model)
    with torch.no_grad(), inactive(model):
        return answer_logits(model, prompts.clean, positions(prompts), sliced=False)


def _pooled(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-sum-exp of the logits of each row's tokens, FILL left out."""
    table = tokens if tokens.ndim == 2 else tokens[:, None]
    picked = logits.gather(1, table.clamp(min=0))
    return picked.masked_fill(table == FILL, -torch.inf).logsumexp(1)
