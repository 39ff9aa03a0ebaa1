"""Work on a model in the tasks of any concurrent.futures executor: threads, processes, clusters. Each task has a model of its own."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from functools import partial
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import nn

W = TypeVar("W")
R = TypeVar("R")


def is_loader(model: Any) -> bool:
    """Whether this is a function that returns a model, not a model."""
    return callable(model) and not isinstance(model, nn.Module | type)


def in_tasks(executor: Executor, run: Callable[[Any, W], R], model: Any, works: Sequence[W], *, done: Callable[[], object]) -> list[R]:
    """`run(a model, work)` for every work, one task each, in the order of `works`; tensors in the results are on the CPU.

    model: a model, of which each task gets a copy, or a function that returns a new one. run: from a module's top level. done: called
    here after each task.

    Raises: TypeError before any task where the model cannot be sent to other processes; what the first failing task raises, and
    then tasks not yet begun are cancelled.
    """
    sent = _for_tasks(model, executor)
    futures = [executor.submit(_task, run, sent, _packed(work)) for work in works]
    try:
        for future in as_completed(futures):
            future.result()
            done()
    finally:
        for future in futures:
            future.cancel()
        if isinstance(sent, _OneAtATime):
            sent.close()
    return [_unpacked(future.result(), "cpu") for future in futures]


class _OneAtATime:
    """Makes a model for each thread. Copying or building a TransformerBridge changes the original and its class meanwhile, so
    no two threads may do so at once, and none once the caller has its model back."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._lock, self._closed = make, Lock(), False

    def __call__(self) -> Any:
        with self._lock:
            if self._closed:
                raise CancelledError("another task failed")
            return self._make()

    def close(self) -> None:
        """Wait for a model that is being made, and make no more."""
        with self._lock:
            self._closed = True


def _for_tasks(model: Any, executor: Executor) -> Any:
    """The model as tasks are to get it: a function that makes one, or bytes. Raises TypeError where it cannot be sent."""
    if isinstance(executor, ThreadPoolExecutor):
        return _OneAtATime(model if is_loader(model) else partial(copy.deepcopy, model))
    try:
        if not is_loader(model):
            return _packed(model)
        if isinstance(executor, ProcessPoolExecutor):  # others may send functions by value (loky, Dask)
            pickle.dumps(model)
        return model
    except Exception as error:
        raise TypeError(
            f"{type(executor).__name__} may run tasks in other processes, and this {type(model).__name__} cannot be pickled for them "
            f"({error}). Give `model` as a function without arguments that returns the model, defined at the top level of a module, "
            "or use a ThreadPoolExecutor."
        ) from error


def _task(run: Callable[[Any, W], R], model: Any, packed: bytes) -> bytes:
    own = _unpacked(model) if isinstance(model, bytes) else model()
    return _packed(run(own, _unpacked(packed, "cpu")))


def _packed(what: Any) -> bytes:
    """As bytes that any executor can send: left to multiprocessing, every tensor would be an open file shared with the sender."""
    buffer = io.BytesIO()
    torch.save(what, buffer)
    return buffer.getvalue()


def _unpacked(packed: bytes, device: str | None = None) -> Any:
    return torch.load(io.BytesIO(packed), map_location=device, weights_only=False)
