"""The three tasks of circuit papers as PromptPairs, for any model whose tokenizer has the words as single tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tl_nodeprune.nodes import check_counts, check_seed, check_types
from tl_nodeprune.prompts.pairs import PromptPairs
from tl_nodeprune.prompts.strings import continuations, is_unknown

__all__ = ["gendered_pronoun", "greater_than", "ioi", "make"]

FEMALE = ("Mary", "Anna", "Sarah", "Lisa", "Emma", "Alice", "Laura", "Julia", "Kate", "Jane", "Susan", "Amy")
MALE = ("John", "Tom", "James", "Peter", "David", "Mark", "Paul", "Jack", "Mike", "Daniel", "Steve", "Adam")
PLACES = ("park", "store", "school", "office", "station", "garden", "library", "beach")
OBJECTS = ("book", "ring", "ball", "letter", "drink", "basket", "key", "lamp")
EVENTS = ("war", "journey", "siege", "project", "reign", "strike", "famine", "voyage")

# {a} and {b}: the two people as they enter; {s}: whoever of them acts; the sentence ends before the other one's name
IOI_TEMPLATES = (
    "When {a} and {b} went to the {place}, {s} gave a {object} to",
    "After {a} and {b} walked to the {place}, {s} handed a {object} to",
    "Then, {a} and {b} met at the {place}, and {s} passed a {object} to",
    "While {a} and {b} were at the {place}, {s} showed a {object} to",
    "Yesterday {a} and {b} visited the {place}. Later {s} offered a {object} to",
    "Once {a} and {b} had left the {place}, {s} sent a {object} to",
)
PRONOUN_TEMPLATES = (
    "So {name} is a really good friend, isn't",
    "So {name} is such a kind person, isn't",
    "So {name} is a very nice neighbor, isn't",
    "So {name} is always on time, isn't",
)
YEARS_TEMPLATE = "The {event} lasted from the year {century}{start} to the year {century}"
CENTURIES = ("11", "12", "13", "14", "15", "16", "17", "18")

BEFORE = "from the year"
"""What the words of a task are read after, to see whether they are one token."""

Row = tuple[str, str, Any, Any]


@dataclass(frozen=True)
class Words:
    """The words a task may use; `usable` keeps those that are one token for a model."""

    female: Sequence[str] = FEMALE
    male: Sequence[str] = MALE
    places: Sequence[str] = PLACES
    objects: Sequence[str] = OBJECTS
    events: Sequence[str] = EVENTS
    years: Sequence[int] = field(default_factory=lambda: range(2, 99))

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.female, *self.male)


def ioi_row(rng: random.Random, words: Words) -> Row:
    """Indirect object, ABBA and BABA alike; corrupted: the same template with three unrelated names."""
    template, fill = rng.choice(IOI_TEMPLATES), {"place": rng.choice(words.places), "object": rng.choice(words.objects)}
    a, b, *others = rng.sample(words.names, 5)
    s, io = rng.choice([(a, b), (b, a)])
    clean = template.format(a=a, b=b, s=s, **fill)
    corrupted = template.format(a=others[0], b=others[1], s=others[2], **fill)
    return clean, corrupted, f" {io}", f" {s}"


def pronoun_row(rng: random.Random, words: Words) -> Row:
    """Gendered pronoun, he or she; corrupted: a name of the other gender."""
    template, (own, other) = rng.choice(PRONOUN_TEMPLATES), rng.sample([(words.female, " she"), (words.male, " he")], 2)
    return template.format(name=rng.choice(own[0])), template.format(name=rng.choice(other[0])), own[1], other[1]


def years_row(rng: random.Random, words: Words) -> Row:
    """Greater-than on two-digit years: right are all later ones, wrong all others; corrupted: the start year ends in 01."""
    fill = {"event": rng.choice(words.events), "century": rng.choice(CENTURIES)}
    start = rng.choice(words.years)
    right, wrong = [f"{y:02d}" for y in range(start + 1, 100)], [f"{y:02d}" for y in range(2, start + 1)]
    return YEARS_TEMPLATE.format(start=f"{start:02d}", **fill), YEARS_TEMPLATE.format(start="01", **fill), right, wrong


ROWS: dict[str, Callable[[random.Random, Words], Row]] = {
    "ioi": ioi_row, "gendered_pronoun": pronoun_row, "greater_than": years_row,
}


def ioi(model: Any, n: int, seed: int) -> PromptPairs:
    """`n` indirect-object prompts ("When Mary and John went to the store, John gave a drink to" -> " Mary", not " John").
    Corrupted: the same template with three unrelated names.

    Raises: ValueError where the model's tokenizer does not have at least five of the names as single tokens.
    """
    return make("ioi", model, n, seed)


def gendered_pronoun(model: Any, n: int, seed: int) -> PromptPairs:
    """`n` gendered-pronoun prompts ("So Mary is a really good friend, isn't" -> " she", not " he").
    Corrupted: a name of the other gender, so that pairs can be searched on in both directions.

    Raises: ValueError where the model's tokenizer has too few of the names as single tokens.
    """
    return make("gendered_pronoun", model, n, seed)


def greater_than(model: Any, n: int, seed: int) -> PromptPairs:
    """`n` greater-than prompts ("The war lasted from the year 1732 to the year 17" -> 33 to 99, not 02 to 32).
    Corrupted: the start year ends in 01.

    Raises: ValueError where the model's tokenizer does not split four-digit years into two tokens of two digits.
    """
    return make("greater_than", model, n, seed)


def make(task: str, model: Any, n: int, seed: int) -> PromptPairs:
    """`n` prompts of a task by its name: "ioi", "gendered_pronoun" or "greater_than"; the same seed gives the same prompts."""
    check_types(make, locals())
    if task not in ROWS:
        raise ValueError(f"unknown task {task!r}; allowed: {', '.join(ROWS)}.")
    check_counts(n=n)
    check_seed(seed)
    words, rng = usable(task, model), random.Random(int(seed))
    return PromptPairs.from_strings(model, *map(list, zip(*(ROWS[task](rng, words) for _ in range(n)), strict=True)))


def usable(task: str, model: Any) -> Words:
    """The words that are one token for this model. Raises ValueError where too few are left for the task."""
    check_types(usable, locals())
    if getattr(model, "tokenizer", None) is None:
        raise ValueError("the model has no tokenizer, and a task needs one; build PromptPairs from token ids instead.")
    female, male = ([name for name in names if is_one_token(model, f" {name}")] for names in (FEMALE, MALE))
    words = Words(female=female, male=male)
    if task == "ioi" and len(words.names) < 5:
        raise ValueError(f"ioi needs five names that are one token each; this tokenizer has {list(words.names)}.")
    if task == "gendered_pronoun" and not (female and male and is_one_token(model, " she") and is_one_token(model, " he")):
        raise ValueError(f"gendered_pronoun needs ' she', ' he' and a name of each gender as one token; it has {female}, {male}.")
    if task == "greater_than":
        digits = [f"{year:02d}" for year in range(2, 100)]
        if not all(is_one_token(model, year) for year in digits) or not _splits_alike(model, 32):
            raise ValueError("greater_than needs a tokenizer that splits ' 1732' into ' 17' and '32', as GPT-2's does; this one does not.")
        return Words(female, male, years=[y for y in range(2, 99) if _splits_alike(model, y)])
    return words


def _splits_alike(model: Any, year: int) -> bool:
    """Whether a year of every century is two tokens, the second of them its last two digits."""
    after = [(f"{BEFORE} {century}", f"{year:02d}") for century in CENTURIES]
    ends, whole = continuations(model, after), continuations(model, [(BEFORE, f" {century}{year:02d}") for century in CENTURIES])
    return all(len(each) == 2 and each[1:] == end for each, end in zip(whole, ends, strict=True))


def is_one_token(model: Any, text: str) -> bool:
    """Whether a string is a single known token for a model, inside a sentence."""
    (ids,) = continuations(model, [(BEFORE, text)])
    return len(ids) == 1 and not is_unknown(model, ids[0], text)
