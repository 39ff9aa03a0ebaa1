"""Checks of arguments that several functions share: types, counts, levels, numbers that are finite."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

_NUMBERS: dict[Any, type] = {int: Integral, float: Real}
_WORDS = {int: "a whole number", float: "a number", str: "a string", bool: "True or False", NoneType: "None", Tensor: "a tensor",
          Mapping: "a mapping", Callable: "a function", nn.Module: "a TransformerLens model"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "strings"}
_EXAMPLES = {int: ", such as (0, 1, 2)", float: ", such as (0.05, 0.1)"}
_HELP = {"PromptPairs": "see PromptPairs.from_strings", "NodeMasks": "model.add_node_masks() returns them",
         "Circuit": "of a result it is `result.circuit`; Circuit.load(path) reads a saved one", "PruneResult": "`prune` returns one",
         "NodeScores": "`rank` returns them, and of effects they are NodeScores.from_effects(effects)",
         "Executor": "for a Dask client give client.get_executor()"}


def check_types(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Raises TypeError that names the first argument of another type than the function's annotations say.

    given: the function's own `locals()`, at its first line. Where an annotation is `Any` nothing is asked, but of `model`, which must be
    a TransformerLens model. True and False are not numbers, a class is not an object of it, and a string is not several strings.
    """
    for name, hint in _hints(function).items():
        if name in given and name != "return":
            if name == "model" and hint is Any:
                check_model(given[name])
            elif not _fits(given[name], hint):
                raise TypeError(_told(name, given[name], hint))
            else:
                check_plain(name, given[name])


def check_plain(name: str, value: object) -> None:
    """Raises ValueError for a tensor, or a dictionary of some, whose numbers cannot be read here as real ones; anything else is right."""
    if isinstance(value, dict):
        for key, one in value.items():
            check_plain(f"{name}[{key!r}]", one)
    if isinstance(value, Tensor):
        kinds = {"sparse": value.layout != torch.strided, "nested": value.is_nested, "quantised": value.is_quantized,
                 "complex": value.is_complex(), 'on the device "meta", which holds no numbers': value.is_meta}
        for kind in (kind for kind, found in kinds.items() if found):
            raise ValueError(f"{name} is {kind}; give a plain tensor of real numbers.")


def check_model(model: object) -> None:
    """Raises TypeError for what is not a TransformerLens model."""
    if not isinstance(model, nn.Module) or not hasattr(model, "hook_dict") or not hasattr(model, "cfg"):
        raise TypeError(f"model must be a HookedTransformer or TransformerBridge, got {_type(model)}; "
                        "TransformerBridge.boot_transformers(name) makes one.")


def reraise_memory(error: BaseException) -> None:
    """Raises an error again that says that memory ran out: it is no fault of what was asked for."""
    ran_out = isinstance(error, MemoryError | torch.cuda.OutOfMemoryError)
    if ran_out or isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):  # torch's own on the CPU has no class
        raise error


def check_device(name: str, device: torch.device | str) -> None:
    """Raises ValueError for a device that cannot compute here."""
    if not _computes(device):
        raise ValueError(f"{name} {str(device)!r} cannot compute here; this machine has "
                         f"{', '.join(filter(_computes, ('cpu', 'cuda', 'mps', 'xpu')))}.")


def _computes(device: torch.device | str) -> bool:
    try:
        return torch.zeros(1, device=device).tolist() == [0]
    except (RuntimeError, AssertionError, ImportError) as error:  # torch built without CUDA asserts, torch.hpu is no module
        reraise_memory(error)
        return False


def check_level(**levels: float) -> None:
    """Raises ValueError for what is not between 0 and 1."""
    for name, value in levels.items():
        if not 0 < value < 1:
            raise ValueError(f"{name}={value}; it must lie between 0 and 1.")


def check_list(name: str, given: object) -> Sequence[Any]:
    """Several values as they are. Raises TypeError for what is no list or tuple of them."""
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"{name} must be a list, got {_type(given)}.")
    return given


def check_node(name: str, node: object) -> tuple[int, ...]:
    """A node (layer, *index) as whole numbers. Raises TypeError."""
    if not isinstance(node, Sequence) or not node or not all(isinstance(i, Integral) and not isinstance(i, bool) for i in node):
        raise TypeError(f"{name} holds {node!r}; give tuples of whole numbers, (layer, *index).")
    return tuple(int(i) for i in node)


def check_seed(seed: int) -> None:
    """Raises ValueError for what not every random generator takes."""
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed={seed}; it must be a whole number, 0 or more, of 63 bits at most.")


@cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(function)


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union; jaxtyping's arrays as plain tensors."""
    if get_origin(hint) in (Union, UnionType):
        return tuple(dict.fromkeys(kind for part in get_args(hint) for kind in _kinds(part)))
    origin = get_origin(hint) or getattr(hint, "array_type", None) or hint
    return (hint if _items(hint) is not None or isinstance(origin, type) and issubclass(origin, Mapping) else origin,)


def _items(hint: Any) -> Any:
    """What several values of a kind are, for Iterable[kind] and its like."""
    origin, args = get_origin(hint), get_args(hint)
    several = isinstance(origin, type) and issubclass(origin, Iterable) and not issubclass(origin, Mapping)
    return args[0] if several and args and args[0] is not Any else None


def _fits(value: Any, hint: Any) -> bool:
    return any(_is(value, kind) for kind in _kinds(hint))


def _is(value: Any, kind: Any) -> bool:
    if kind in (Any, object):
        return True
    if kind is Callable:
        return callable(value)
    if isinstance(value, bool | type):
        return kind is type(value)
    if kind is nn.Module:
        return isinstance(value, nn.Module) and hasattr(value, "hook_dict")
    if (item := _items(kind)) is None:
        return isinstance(value, _NUMBERS.get(kind, get_origin(kind) or kind))
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping | Tensor) or getattr(value, "ndim", 1) != 1:
        return False
    if get_origin(kind) is not Iterable and not hasattr(value, "__getitem__"):  # a set or a generator is no sequence
        return False
    return not isinstance(value, Collection) or all(_fits(one, item) for one in value)


def _told(name: str, value: Any, hint: Any) -> str:
    """The sentence for an argument of a wrong type: what it is, what it must be, and where to get that."""
    kinds = [kind for kind in _kinds(hint) if kind is not NoneType and not (kind is int and float in _kinds(hint))]
    words = list(dict.fromkeys(map(_name, kinds)))
    must = f"must be {' or '.join(filter(None, [', '.join(words[:-1]), words[-1]]))}"
    helped = [f"; {_HELP[kind.__name__]}" for kind in kinds if getattr(kind, "__name__", "") in _HELP][:1]
    items = [item for kind in kinds if (item := _items(kind))]
    if isinstance(value, NoneType | bool | Real | str) and (items or any(kind in _WORDS for kind in kinds)):
        return f"{name}={value!r}; it {must}{''.join(helped)}."
    several = isinstance(value, list | tuple | set)
    wrong = [one for one in value if not any(_fits(one, item) for item in items)] if several and items else []
    return f"{name} {must}, {f'but it holds {wrong[0]!r}' if wrong else f'got {_type(value)}'}{''.join(helped)}."


def _name(kind: Any) -> str:
    if (item := _items(kind)) is not None:
        return f"several {' or '.join(_PLURALS.get(kind, 'lists of them') for kind in _kinds(item))}{_EXAMPLES.get(item, '')}"
    if get_args(kind) == (str, Tensor):
        return "a mapping from hook name to tensor"
    kind = get_origin(kind) or kind
    name = str(getattr(kind, "__name__", kind))
    article = "" if name.endswith(("Pairs", "Masks", "Scores", "Effects")) else "an " if name[0] in "AEIOU" else "a "
    return _WORDS.get(kind, article + name)


def _type(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def check_counts(least: int = 1, **counts: object) -> None:
    """Raises ValueError for what is no whole number, or below `least`."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name}={value!r}; it must be a whole number, {least} or more.")


def check_number(name: str, value: object, kind: type = Real) -> None:
    """Raises TypeError for what is not a number, or not a whole one (Integral)."""
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name}={value!r}; it must be a {'whole ' if kind is Integral else ''}number.")


def check_agreement(agreement: Any) -> None:
    """Raises TypeError for what is not a number, ValueError for what is not a share; None is right."""
    if agreement is None:
        return
    check_number("agreement", agreement)
    if not 0 <= agreement <= 1:
        raise ValueError(f"agreement={agreement}; it is a share of the prompts, 0 to 1.")


def check_several(name: str, given: Iterable[Any], example: str) -> tuple[Any, ...]:
    """What was given as a tuple. Raises ValueError where it is empty or given twice."""
    values = tuple(given)
    if not values:
        raise ValueError(f"{name} is empty; give one or more numbers, such as {example}.")
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise ValueError(f"{name}={values} holds {twice[0]} more than once; give each once.")
    return values


def check_logits(logits: Tensor, of: str) -> None:
    """Raises FloatingPointError that says whose logits [... d_vocab] hold a NaN or inf; a token that never occurs may have -inf."""
    if bool(logits.isnan().any()) or not bool(logits.amax(-1).isfinite().all()):
        raise FloatingPointError(f"NaN or inf in the logits of {of}; nothing was changed. In half precision try float32, "
                                 "and check that the model runs on these prompts.")


def check_finite(values: Tensor, what: str) -> None:
    """Raises FloatingPointError where a number is NaN or inf. what: they are, and of what."""
    if not values.isfinite().all():
        raise FloatingPointError(f"NaN or inf in {what}; nothing was changed. In half precision try float32, and check that the model runs "
                                 "on these prompts. A logit of -inf is right only at tokens that are not an answer and never occur.")
