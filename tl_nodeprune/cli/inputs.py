"""What a command line names: a model, a task, files to read and to write; checked before the model is loaded."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

from tl_nodeprune import toy
from tl_nodeprune.circuit import files
from tl_nodeprune.nodes import check_counts, check_device, check_seed
from tl_nodeprune.prompts import PromptPairs, read_rows, tasks

CIRCUIT, REPORT = "circuit.safetensors", "report.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_model_and_task(parser: argparse.ArgumentParser, *, seed: int, prompts: int, seed_of: str, required: bool = True
                        ) -> None:
    parser.add_argument("--model", required=required, help="a Hugging Face name or folder, or 'toy' for the embedded model")
    parser.add_argument("--task", required=required, help=f"{', '.join(tasks.ROWS)}, or a .jsonl file (clean, corrupted, answer, wrong)")
    parser.add_argument("--prompts", type=int, default=prompts, help="how many, for the named tasks (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=seed, help=f"of {seed_of} (default: %(default)s)")
    add_model_options(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: %(default)s)")
    parser.add_argument("--device-map", metavar="MAP", help="instead, spread over devices as Hugging Face does: auto, balanced, sequential")
    parser.add_argument("--dtype", default="float32", choices=tuple(DTYPES), help="of the model's weights (default: %(default)s)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model from the Hugging Face hub")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hugging Face hub")


def count_or_share(text: str) -> float | int:
    """A count (200) or a share (0.1). argparse shows the name of this function where it fails."""
    return int(text) if text.strip().lstrip("+-").isdigit() else float(text)


def check_page(path: Path, name: str = "--html") -> None:
    """Raises ValueError or OSError where a file cannot be written; nothing is made yet."""
    if path.is_dir():
        raise ValueError(f"{name} {str(path)!r} is a folder; give the name of a file.")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"{name} {str(path)!r} cannot be written: {str(above)!r} is a file.")
    if path.parent.is_dir():
        files.check_target(path)


def inputs_of(args: argparse.Namespace) -> dict[str, Path]:
    """The files that are read, by what they are called. A page, circuit or report in the model's folder is none of the model's."""
    own = [path for path in Path(args.model).glob("*") if path.name not in (CIRCUIT, REPORT) and path.suffix != ".html"]
    task = {} if args.task in tasks.ROWS else {"--task": Path(args.task)}
    return task | {f"the model's {path.name}": path for path in own}


def make_folder(name: str, path: Path) -> None:
    try:
        files.make_folder(path)
    except OSError as error:
        raise ValueError(f"{name} {str(path)!r} cannot be written: {error}") from error


def check_source(args: argparse.Namespace, least: int = 1) -> None:
    """What can be wrong with the prompts and the device before there is a model."""
    check_counts(least, **{"--prompts": args.prompts})
    check_seed(args.seed)
    if args.device_map is not None and args.device != "cpu":
        raise ValueError(f"--device-map {args.device_map!r} goes without --device; it says where each part of the model is.")
    check_device("--device", args.device)
    if args.task not in tasks.ROWS:
        if not Path(args.task).is_file():
            raise ValueError(f"--task {args.task!r} is neither a task ({', '.join(tasks.ROWS)}) nor a file.")
        read_rows(args.task)


def prompts_of(args: argparse.Namespace, model: Any) -> PromptPairs:
    """Those prompts of the task that the model answers right."""
    named = args.task in tasks.ROWS
    prompts = tasks.make(args.task, model, args.prompts, args.seed) if named else PromptPairs.from_jsonl(model, args.task)
    right = prompts.correct(model)
    print(f"The model answers {len(right)} of {len(prompts)} prompts right; the circuit is for those.")
    return right


def model_of(args: argparse.Namespace) -> Any:
    """The model that a command line asks for."""
    return load_model(args.model, args.device, args.dtype, trust_remote_code=args.trust_remote_code, device_map=args.device_map,
                      revision=args.revision)


def load_model(name: str, device: str, dtype: str = "float32", *, trust_remote_code: bool = False, device_map: str | None = None,
               revision: str | None = None) -> Any:
    """A model by its Hugging Face name or folder, or the embedded one for "toy". Raises ValueError for a device that cannot be used, and a
    model that cannot be loaded."""
    check_device("--device", device)
    if name == "toy" and (device_map or revision):
        raise ValueError("the embedded model 'toy' has no --revision and is on one --device; leave out --device-map and --revision.")
    if name == "toy":
        return toy.load(n=1)[0].to(device).to(DTYPES[dtype])
    from transformer_lens.model_bridge import TransformerBridge

    transformers.logging.set_verbosity_warning()  # weights that the files lack are new ones at random: it reports them
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(record=True) as caught:
            model = TransformerBridge.boot_transformers(
                name, device=None if device_map else device, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code,
                **{key: value for key, value in {"device_map": device_map, "revision": revision}.items() if value is not None})
    except Exception as error:  # whatever is wrong with the files of others, or with the code that comes with them
        raise ValueError(f"--model {name!r} cannot be loaded: {type(error).__name__}: {error}") from error
    pass_on(caught)
    return model.eval()


def pass_on(caught: Iterable[warnings.WarningMessage]) -> None:
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
