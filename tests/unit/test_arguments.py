"""Every public function against wrong arguments: functions x arguments x wrong values, generated from their signatures.

A new public function fails here until it has a valid call in `CALLS`; a new number or word among arguments until it is in `NUMBERS` or
`WORDS`. What a value of an argument may be is decided here by plain `isinstance`, not by the library's own checks.
"""

from __future__ import annotations

import inspect
import json
import math
import random
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from transformer_lens import patching

import tl_nodeprune as tlnp
from tl_nodeprune.nodes.attachment import find_attachment
from tl_nodeprune.nodes.probe import find_nodes
from tl_nodeprune.search.sweep import SweepRun

HERE = str(Path(tlnp.__file__).parent)
HEADS = ("head", "mlp")
LIST = tlnp.known.KnownCircuit("x", "y", {"r": ((0, 1),)}, n_layers=3, n_heads=4)
CLASSES = (tlnp.Ablation, tlnp.Circuit, tlnp.HardConcrete, tlnp.NodeMasks, tlnp.NodeScores, tlnp.PaperObjective, tlnp.PromptPairs,
           tlnp.PruneResult, tlnp.Report, tlnp.StepGate, tlnp.Sweep, tlnp.crosscheck.Agreement, tlnp.crosscheck.Effects,
           tlnp.known.KnownCircuit)
# what the library itself makes, and what is called by it alone, each step
NOT_CALLED_BY_USERS = {
    *("Comparison", "Estimate", "Evaluation", "Explanation", "PruneResult", "Report", "Sweep"),
    *("crosscheck.Agreement", "crosscheck.Effects", "crosscheck.NodeScore",
      "crosscheck.GranularityAgreement", "hypotheses.HypothesisTest", "mib.FaithfulnessCurve"),
    *(f"{gate}.{name}" for gate in ("HardConcrete", "StepGate") for name in ("value", "sample", "probability", "kept")),
    "PaperObjective.train", "PaperObjective.sparsity", "Circuit.hooks_on", "Ablation.values", "PromptPairs.check_corrupted"}


PUT_ON = (tlnp.NodeMasks.set_to, tlnp.NodeMasks.to_circuit)  # functions as methods: their masks are the method's own


def public() -> dict[str, Callable[..., Any]]:
    """Every public function, class and method that takes arguments, by name."""
    found: dict[str, Callable[..., Any]] = {}
    for name in tlnp.__all__:
        one = getattr(tlnp, name)
        inside = {f"{name}.{part}": getattr(one, part) for part in one.__all__} if inspect.ismodule(one) else {name: one}
        found |= {key: value for key, value in inside.items() if callable(value)}
    for key, kind in list(found.items()):
        if kind in CLASSES:
            own = {name for one in kind.__mro__ if one.__module__.startswith("tl_nodeprune") for name in vars(one)}
            found |= {f"{key}.{name}": getattr(kind, name) for name in sorted(own)
                      if not name.startswith("_") and callable(getattr(kind, name))}
    return {key: function for key, function in found.items() if key not in NOT_CALLED_BY_USERS and arguments_of(function)}


def arguments_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    own = ("self", "masks") if function in PUT_ON else ("self",)
    return [p for p in inspect.signature(function).parameters.values() if p.name not in own and p.kind not in variadic]


@dataclass
class World:
    """Something of everything. masks: attached to a model of their own."""

    model: Any
    prompts: tlnp.PromptPairs
    masks: tlnp.NodeMasks
    result: tlnp.PruneResult
    circuit: tlnp.Circuit
    scores: tlnp.NodeScores
    effects: Any
    sweep: tlnp.Sweep
    report: tlnp.Report
    agreement: Any
    explanation: tlnp.Explanation
    other: Any
    folder: Path

    @property
    def texts(self) -> dict[str, Any]:
        to = ["When Mary and John went to the store, John gave a drink to"]
        return {"clean": to, "corrupted": ["When Anna and Tom went to the store, Mark gave a drink to"], "answers": [" Mary"],
                "wrong_answers": [" John"]}

    @property
    def logits(self) -> Tensor:
        return torch.randn(len(self.prompts), self.model.cfg.d_vocab, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def world(toy: Any, other_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    model, prompts = toy
    some = prompts[:8]
    masks = tlnp.toy.load("ioi", n=1)[0].add_node_masks(HEADS)
    result = masks.prune(prompts, max_nodes=0.5, steps=1, exact_tests=0, progress=False)
    circuit, folder = result.circuit, tmp_path_factory.mktemp("arguments")
    effects = tlnp.crosscheck.attribution_patching(model, some, HEADS)
    report = tlnp.report(model, circuit, some, n_random=2, n_subsets=2, max_units=2, progress=False)
    circuit.save(folder / "circuit.safetensors")
    tlnp.mib.write(model, result.scores, folder / "scores.json")  # type: ignore[arg-type]
    row = {"clean": "When Mary and John", "corrupted": "When Anna and Tom", "answer": " Mary", "wrong": " John"}
    (folder / "prompts.jsonl").write_text(json.dumps(row))
    sweep = tlnp.Sweep((SweepRun(0.05, 0, result, report.evaluation),))
    yield World(model, some, masks, result, circuit, result.scores, effects, sweep, report,  # type: ignore[arg-type]
                tlnp.crosscheck.agreement(circuit, effects), tlnp.explain(model, circuit, some, nodes=2), other_model, folder)
    masks.remove()


def within(manager: Any) -> Callable[..., None]:
    """A context manager as a function."""
    def call(**kwargs: Any) -> None:
        with manager(**kwargs):
            pass
    return call


def exhausted(iterate: Any) -> Callable[..., Any]:
    return lambda **kwargs: list(iterate(**kwargs))


def attached_for_a_while(function: Any) -> Callable[..., None]:
    def call(**kwargs: Any) -> None:
        function(**kwargs)
        kwargs["model"].remove_node_masks()
    return call


def reattached(world: World) -> Callable[..., None]:
    def call(model: Any) -> None:
        tlnp.remove_node_masks(model)
        world.masks.attach(model)
    return call


def while_on(world: World) -> Callable[..., None]:
    def call(model: Any) -> None:
        home = world.masks.model
        world.masks.remove()
        try:
            with world.masks.on(model):
                pass
        finally:
            world.masks.attach(home)
    return call


def scores_of(world: World) -> dict[str, Tensor]:
    return {f"blocks.{layer}.attn.hook_z": torch.arange(4.0) for layer in range(3)}


# a valid call of every public function: what is called, and its arguments by name
CALLS: dict[str, Callable[[World], tuple[Callable[..., Any], dict[str, Any]]]] = {
    "Ablation": lambda w: (tlnp.Ablation, {"name": "mean", "constants": {"blocks.0.hook_mlp_out": torch.zeros(3)}}),
    "About": lambda w: (tlnp.About, {"kl": 0.1, "interval": (0.0, 0.2), "versions": {"torch": "2"}}),
    "Ablation.check_fits": lambda w: (tlnp.Ablation().check_fits, {"space": w.circuit.space}),
    "Ablation.fit": lambda w: (tlnp.Ablation("mean").fit, {"model": w.model, "prompts": w.prompts, "hooks": ["blocks.0.hook_mlp_out"]}),
    "Circuit": lambda w: (tlnp.Circuit, {"space": w.circuit.space, "gates": {k: w.circuit.live(*k) for k in w.circuit.space.shapes}}),
    "Circuit.full": lambda w: (tlnp.Circuit.full, {"space": w.circuit.space}),
    "Circuit.from_nodes": lambda w: (tlnp.Circuit.from_nodes, {"model": w.model, "nodes": {"head": [(1, 2)]}}),
    "Circuit.from_masks": lambda w: (tlnp.Circuit.from_masks, {"model": w.model, "masks": {"blocks.0.hook_mlp_out": torch.ones(96)}}),
    "Circuit.empty": lambda w: (tlnp.Circuit.empty, {"space": w.circuit.space}),
    "Circuit.live": lambda w: (w.circuit.live, {"granularity": "head", "layer": 1}),
    "Circuit.nodes": lambda w: (w.circuit.nodes, {"granularity": "head"}),
    "Circuit.at": lambda w: (w.circuit.at, {"granularities": "head"}),
    "Circuit.under": lambda w: (w.circuit.under, {"ablation": "zero"}),
    "Circuit.with_about": lambda w: (w.circuit.with_about, {"about": tlnp.About(task="x")}),
    "Circuit.iou": lambda w: (w.circuit.iou, {"other": ~w.circuit}),
    "Circuit.check_fits": lambda w: (w.circuit.check_fits, {"model": w.model}),
    "Circuit.fwd_hooks": lambda w: (w.circuit.fwd_hooks, {"model": w.model, "prompts": w.prompts}),
    "Circuit.applied": lambda w: (within(w.circuit.applied), {"model": w.model, "prompts": w.prompts}),
    "Circuit.save": lambda w: (w.circuit.save, {"path": w.folder / "again.safetensors"}),
    "Circuit.load": lambda w: (tlnp.Circuit.load, {"path": w.folder / "circuit.safetensors"}),
    "HardConcrete": lambda w: (tlnp.HardConcrete, {}),
    "StepGate": lambda w: (tlnp.StepGate, {}),
    "PaperObjective": lambda w: (tlnp.PaperObjective, {"weights": {"head": 2.0}}),
    "NodeMasks": lambda w: (tlnp.NodeMasks, {"space": w.circuit.space}),
    "NodeMasks.score": lambda w: (w.masks.score, {"key": next(iter(w.circuit.space.shapes))}),
    "NodeMasks.gate_values": lambda w: (w.masks.gate_values, {"key": next(iter(w.circuit.space.shapes))}),
    "NodeMasks.mask": lambda w: (w.masks.mask, {"hook": w.circuit.space.hooks[0]}),
    "NodeMasks.set_to": lambda w: (w.masks.set_to, {"circuit": w.circuit}),
    "NodeMasks.sampling": lambda w: (within(w.masks.sampling), {"generator": torch.Generator()}),
    "NodeMasks.paired": lambda w: (within(w.masks.paired), {"prompts": w.prompts}),
    "NodeMasks.standing_in": lambda w: (within(w.masks.standing_in), {"values": {"blocks.0.hook_mlp_out": torch.zeros(96)}}),
    "NodeMasks.attach": lambda w: (reattached(w), {"model": w.masks.model}),
    "NodeMasks.on": lambda w: (while_on(w), {"model": w.masks.model}),
    "NodeMasks.prune": lambda w: (w.masks.prune, {"prompts": w.prompts, "max_nodes": 4, "steps": 1, "exact_tests": 0, "progress": False}),
    "NodeScores": lambda w: (tlnp.NodeScores, {"gates": w.scores.gates, "space": w.scores.space}),
    "NodeScores.from_flat": lambda w: (tlnp.NodeScores.from_flat, {"flat": w.scores.flat, "space": w.scores.space}),
    "NodeScores.from_effects": lambda w: (tlnp.NodeScores.from_effects, {"effects": w.effects}),
    "NodeScores.from_circuit": lambda w: (tlnp.NodeScores.from_circuit, {"circuit": w.circuit, "within": w.scores}),
    "NodeScores.top": lambda w: (w.scores.top, {"size": 3}),
    "NodeScores.count": lambda w: (w.scores.count, {"size": 0.5}),
    "PromptPairs": lambda w: (tlnp.PromptPairs, {name: getattr(w.prompts, name) for name in w.prompts.__dataclass_fields__}),
    "PromptPairs.from_strings": lambda w: (tlnp.PromptPairs.from_strings, {"model": w.model, **w.texts}),
    "PromptPairs.from_jsonl": lambda w: (tlnp.PromptPairs.from_jsonl, {"model": w.model, "path": w.folder / "prompts.jsonl"}),
    "PromptPairs.batches": lambda w: (exhausted(w.prompts.batches), {"batch_size": 3}),
    "PromptPairs.to": lambda w: (w.prompts.to, {"device": "cpu"}),
    "PromptPairs.split": lambda w: (w.prompts.split, {"share": 0.5, "seed": 0}),
    "PromptPairs.correct": lambda w: (w.prompts.correct, {"model": w.model}),
    "PromptPairs.logit_diff": lambda w: (w.prompts.logit_diff, {"logits": w.logits}),
    "PromptPairs.show": lambda w: (w.prompts.show, {"n": 2}),
    "PromptPairs.check_fits": lambda w: (w.prompts.check_fits, {"model": w.model}),
    "PruneResult.at": lambda w: (w.result.at, {"max_nodes": 5}),
    "Report.verdict": lambda w: (w.report.verdict, {"name": "task"}),
    "Sweep.frequency": lambda w: (w.sweep.frequency, {"max_kl": 0.05}),
    "Sweep.iou": lambda w: (w.sweep.iou, {"max_kl": 0.05}),
    "Sweep.consensus": lambda w: (w.sweep.consensus, {"max_kl": 0.05}),
    "add_node_masks": lambda w: (attached_for_a_while(tlnp.add_node_masks), {"model": w.model, "granularities": ["head"], "layers": [0]}),
    "remove_node_masks": lambda w: (lambda model: (tlnp.remove_node_masks(model), w.masks.attach(model)), {"model": w.masks.model}),
    "compare": lambda w: (tlnp.compare, {"circuits": {"a": w.circuit, "b": ~w.circuit}, "model": w.model, "prompts": {"a": w.prompts}}),
    "crosscheck.Agreement.of": lambda w: (w.agreement.of, {"granularity": "head"}),
    "crosscheck.Effects.of": lambda w: (w.effects.of, {"granularity": "head"}),
    "crosscheck.Effects.to_patching_result": lambda w: (w.effects.to_patching_result, {"granularity": "head"}),
    "crosscheck.activation_patching": lambda w: (tlnp.crosscheck.activation_patching,
                                                 {"model": w.model, "prompts": w.prompts, "granularities": ["mlp"], "progress": False}),
    "crosscheck.attribution_patching": lambda w: (tlnp.crosscheck.attribution_patching,
                                                  {"model": w.model, "prompts": w.prompts, "granularities": ["mlp"]}),
    "crosscheck.agreement": lambda w: (tlnp.crosscheck.agreement, {"circuit": w.circuit, "scores": w.effects}),
    "estimate": lambda w: (tlnp.estimate, {"model": w.model, "prompts": w.prompts, "granularities": ["mlp"]}),
    "evaluate": lambda w: (tlnp.evaluate, {"model": w.model, "circuit": w.circuit, "prompts": w.prompts}),
    "explain": lambda w: (tlnp.explain, {"model": w.model, "circuit": w.circuit, "prompts": w.prompts, "nodes": 1}),
    "hypotheses.equivalence": lambda w: (tlnp.hypotheses.equivalence, {"circuit": w.logits[0, :30], "full": w.logits[1, :30]}),
    "hypotheses.independence": lambda w: (tlnp.hypotheses.independence, {"complement": w.logits[0, :30], "full": w.logits[1, :30]}),
    "hypotheses.minimality": lambda w: (tlnp.hypotheses.minimality,
                                        {"effects": w.logits[0, :3], "reference": w.logits[1, :150], "names": ["a", "b", "c"]}),
    "kl_divergence": lambda w: (tlnp.kl_divergence, {"logits": w.logits, "full": w.logits, "prompts": w.prompts}),
    "known.overlap": lambda w: (tlnp.known.overlap, {"circuit": w.circuit, "known": LIST}),
    "known.KnownCircuit": lambda w: (tlnp.known.KnownCircuit, {"name": "x", "source": "y", "roles": {"r": ((0, 1),)}}),
    "known.KnownCircuit.circuit": lambda w: (LIST.circuit, {"model": w.model}),
    "mib.area": lambda w: (tlnp.mib.area, {"sizes": (0.1, 1.0), "values": (0.5, 1.0)}),
    "mib.distance": lambda w: (tlnp.mib.distance, {"logits": w.logits, "full": w.logits, "prompts": w.prompts}),
    "mib.shortfall": lambda w: (tlnp.mib.shortfall, {"logits": w.logits, "full": w.logits, "prompts": w.prompts}),
    "mib.evaluate": lambda w: (tlnp.mib.evaluate, {"model": w.model, "scores": scores_of(w), "prompts": w.prompts}),
    "mib.read": lambda w: (tlnp.mib.read, {"model": w.model, "path": w.folder / "scores.json"}),
    "mib.write": lambda w: (tlnp.mib.write, {"model": w.model, "scores": w.scores, "path": w.folder / "again.json"}),
    "prune": lambda w: (tlnp.prune, {"masks": w.masks, "prompts": w.prompts, "max_nodes": 4, "steps": 1, "exact_tests": 0,
                                     "progress": False}),
    "rank": lambda w: (tlnp.rank, {"masks": w.masks, "prompts": w.prompts, "steps": 1, "progress": False}),
    "report": lambda w: (tlnp.report, {"model": w.model, "circuit": w.circuit, "prompts": w.prompts, "n_random": 1, "n_subsets": 1,
                                       "max_units": 1, "progress": False}),
    "sweep": lambda w: (tlnp.sweep, {"model": w.model, "prompts": w.prompts, "max_kl": (9.0,), "seeds": (0,), "granularities": ["mlp"],
                                     "steps": 1, "progress": False}),
    "tasks.ioi": lambda w: (tlnp.tasks.ioi, {"model": w.model, "n": 2, "seed": 0}),
    "tasks.gendered_pronoun": lambda w: (tlnp.tasks.gendered_pronoun, {"model": w.model, "n": 2, "seed": 0}),
    "tasks.greater_than": lambda w: (tlnp.tasks.greater_than, {"model": w.model, "n": 2, "seed": 0}),
    "tasks.make": lambda w: (tlnp.tasks.make, {"task": "ioi", "model": w.model, "n": 2, "seed": 0}),
    "toy.load": lambda w: (tlnp.toy.load, {"task": "ioi", "n": 2}),
    "viz.agreement": lambda w: (tlnp.viz.agreement, {"circuit": w.circuit, "effects": w.effects}),
    "viz.answer_attention": lambda w: (tlnp.viz.answer_attention, {"model": w.model, "circuit": w.circuit, "prompts": w.prompts,
                                                                  "head": (0, 0), "most": 2}),
    "viz.circuit_graph": lambda w: (tlnp.viz.circuit_graph, {"circuit": w.circuit}),
    "viz.compare": lambda w: (tlnp.viz.compare, {"circuit_a": w.circuit, "circuit_b": ~w.circuit}),
    "viz.explanation": lambda w: (tlnp.viz.explanation, {"found": w.explanation, "edges": 2}),
    "viz.frontier": lambda w: (lambda **kwargs: tlnp.viz.frontier(w.result, **kwargs), {"names": ["a"]}),
    "viz.history": lambda w: (tlnp.viz.history, {"result": w.result}),
    "viz.kept_heads": lambda w: (tlnp.viz.kept_heads, neurons(w, tlnp.Circuit.full, "head")),
    "viz.kept_neurons": lambda w: (tlnp.viz.kept_neurons, neurons(w, tlnp.Circuit.full)),
    "viz.pruned_neurons": lambda w: (tlnp.viz.pruned_neurons, neurons(w, tlnp.Circuit.empty)),
    "viz.mask_map": lambda w: (tlnp.viz.mask_map, {"circuit": w.circuit, "scores": w.scores, "effects": w.effects}),
    "viz.neuron_map": lambda w: (tlnp.viz.neuron_map, {"circuit": neurons(w, tlnp.Circuit.full)["circuit"]}),
    "viz.node_table": lambda w: (tlnp.viz.node_table, {"circuit": w.circuit}),
    "viz.overview": lambda w: (tlnp.viz.overview, {"model": w.model, "circuit": w.circuit, "prompts": w.prompts}),
    "viz.save_html": lambda w: (lambda **kwargs: tlnp.viz.save_html(kwargs.pop("path"), "text", **kwargs),
                                {"path": w.folder / "page.html"}),
    "viz.token_effects": lambda w: (tlnp.viz.token_effects, {"model": w.model, "circuit": w.circuit, "prompts": w.prompts}),
}


FUNCTIONS = public()
HERE_CALLS = [name for name in CALLS if name != "crosscheck.Effects.to_patching_result" or hasattr(patching, "PatchingResult")]
"""Those that this TransformerLens can do; to_patching_result's own test has the rest."""


def neurons(world: World, make: Any, granularity: str = "mlp_neuron") -> dict[str, Any]:
    return {"model": world.model, "circuit": make(find_nodes(world.model).restrict(granularity)), "prompts": world.prompts}


def whole(least: float) -> Callable[[Any], bool]:
    return lambda value: value >= least


def share(value: Any) -> bool:
    return bool(0 < value < 1)


def positive(value: Any) -> bool:
    return bool(0 < value < math.inf)


def at_least_0(value: Any) -> bool:
    return bool(0 <= value < math.inf)


# which numbers are right, by argument
NUMBERS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("batch_size", "n", "nodes", "edges", "n_random", "n_subsets", "max_units", "most", "permutations", "steps",
                     "step_prompts", "n_layers"), whole(1)),
    **dict.fromkeys(("exact_tests", "cache_bytes", "ties"), at_least_0),
    **dict.fromkeys(("alpha", "quantile"), share), **dict.fromkeys(("max_kl", "time_limit", "beta", "width", "max_loss"), positive),
    **dict.fromkeys(("lr", "lr_end", "warmup", "weight_decay", "max_grad_norm"), at_least_0),
    "kl": math.isfinite, "accuracy": math.isfinite, "held_out": whole(0), "searched": whole(0), "n_heads": whole(2),
    "seed": lambda v: 0 <= v < 1 << 63, "agreement": lambda v: 0 <= v <= 1, "lam": lambda v: 0 <= v <= 1,
    "tolerance": lambda v: 0 <= v <= 0.4, "hinge": math.isfinite, "share": share, "prompt": lambda v: -8 <= v < 8,
    "layer": lambda v: 0 <= v < 3, "layers": lambda v: -3 <= v < 3,
    "max_nodes": lambda v: v in (1, 2, 3), "size": lambda v: v in (0, 1, 2, 3, 1.0, 0.0), "gamma": lambda v: -math.inf < v < 0,
    "zeta": lambda v: v == 1.1, "open_score": lambda v: 2.5 <= v < math.inf, "closed_score": lambda v: -math.inf < v <= -3,
}
ANY_TEXT = ("task", "command", "title", "path", "device", "checkpoint", "source", "notes", "budget", "loss", "model_name")
# words that are right, where not any text is
WORDS = {"granularity": ("head", "mlp_neuron"), "granularities": HEADS, "ablation": ("interchange", "mean", "zero", "optimal"),
         "name": (), "hook": (),
         "on_error": ("raise", "skip"), "long_answers": ("raise", "first"),
         "direction": ("denoise", "noise"), "units": ("block", "node"), "level": ("node", "neuron", "head"),
         "task": ("ioi", "gendered_pronoun", "greater_than"),
         "model_class": ("TransformerBridge", "HookedTransformer")}
# values that are right although the table says otherwise: function and argument, and which
RIGHT: dict[tuple[str, str], tuple[str, ...]] = {
    ("Ablation", "constants"): ("{}",), ("PaperObjective", "weights"): ("{}",), ("NodeMasks.standing_in", "values"): ("{}",),
    ("hypotheses.minimality", "effects"): ("integers [2]",), ("StepGate", "open_score"): ("2.5", "1", "10**30"),
    ("StepGate", "closed_score"): ("-1", "0", "-0.5"), ("add_node_masks", "layers"): ("[1, 1]", "[-1]"),
    ("About", "interval"): ("[1.5, 0.5]", "[1, 1]", "numpy [2]"), ("About", "versions"): ("{}",), ("About", "seed"): ("-1", "10**30"),
    ("compare", "model"): ("None",), ("estimate", "layers"): ("[1, 1]", "[-1]"), ("Circuit.at", "layers"): ("[1, 1]", "[-1]"),
    ("known.KnownCircuit", "name"): ("'x'", "''"), ("known.KnownCircuit", "mlps"): ("[]", "()", "[1, 1]"),
    ("known.KnownCircuit", "n_layers"): ("1",), ("known.KnownCircuit", "n_heads"): ("2",),
    ("sweep", "max_kl"): ("[1.5, 0.5]", "[99]", "numpy [2]"), ("sweep", "seeds"): ("[99]",),
    ("PromptPairs.check_fits", "name"): ("'x'", "''"),
 ("Sweep.consensus", "share"): ("1",), ("crosscheck.agreement", "share"): ("1",),
    ("mib.area", "sizes"): ("[1.5, 0.5]", "numpy [2]", "[1, 1]"), ("mib.area", "values"): ("[1.5, 0.5]", "numpy [2]", "[1, 1]"),
    ("viz.compare", "names"): ("['x', 'y']",), ("viz.answer_attention", "head"): ("[1, 1]",),
}
WRONG_TASK = ("tasks.make", "toy.load")


def values(world: World) -> dict[str, Any]:
    """Values of all kinds; which of them are right depends on the argument."""
    big = {name: getattr(world.prompts, name) for name in world.prompts.__dataclass_fields__}
    return {
        "None": None, "True": True, "False": False, "'x'": "x", "''": "", "0": 0, "1": 1, "-1": -1, "2.5": 2.5, "-0.5": -0.5,
        "10**30": 10**30,
        "nan": math.nan, "inf": math.inf, "-inf": -math.inf, "1j": 1j, "[]": [], "['x', 'y']": ["x", "y"], "[1.5, 0.5]": [1.5, 0.5],
        "[1, 1]": [1, 1], "[True]": [True], "[None]": [None], "[nan, 1.0]": [math.nan, 1.0], "[-1]": [-1], "[99]": [99], "()": (), "{}": {},
        "{'x': 1}": {"x": 1}, "{'head': nan}": {"head": math.nan}, "an object": object(), "a class": int, "a function": lambda *args: None,
        "a gate's class": tlnp.HardConcrete, "bytes": b"x", "a set": {1.5}, "a generator": torch.Generator(), "a path": Path("nowhere/x"),
        "number [] ": torch.tensor(1.0), "zeros [2 3 5]": torch.zeros(2, 3, 5), "NaN [8 4]": torch.full((8, 4), math.nan),
        "NaN [30]": torch.full((30,), math.nan), "empty [0]": torch.zeros(0), "integers [2]": torch.zeros(2, dtype=torch.long),
        "-7 [8 3]": torch.full((8, 3), -7), "complex [8 3]": torch.zeros(8, 3, dtype=torch.complex64),
        "meta [8 3]": torch.zeros(8, 3, device="meta"),
        "numpy [2]": np.array([0.5, 1.5]), "numpy 'x'": np.array("x"), "a frame": pd.DataFrame({"size": ["x"]}),
        "a module": nn.Linear(2, 2),
        "tokens unknown": tlnp.PromptPairs(**big | {"clean": world.prompts.clean + 10**6}),
        "prompts too long": tlnp.PromptPairs(**{k: big[k] for k in ("answers", "wrong_answers")}, clean=torch.ones(8, 99, dtype=torch.long),
                                             corrupted=torch.zeros(8, 99, dtype=torch.long)),
        "another model's circuit": tlnp.Circuit.full(find_nodes(world.other)), "another model": world.other,
        "prompts": world.prompts, "circuit": world.circuit, "a result": world.result, "the model": world.model,
    }


@cache
def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(function.__init__ if isinstance(function, type) and "__init__" in vars(function) else function)


def alternatives(hint: Any) -> list[Any]:
    return [one for part in get_args(hint) for one in alternatives(part)] if get_origin(hint) in (Union, UnionType) else [hint]


def wrong(function: str, argument: str, hint: Any, label: str, value: Any) -> bool | None:
    """Whether a value is surely wrong; None where it is right, or may be."""
    if label in RIGHT.get((function, argument), ()):
        return None
    kinds = alternatives(hint)
    scalar = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if argument == "model":
        return None if value is not None and hasattr(value, "hook_dict") or function == "sweep" and callable(value) else True
    if value is None:
        return None if NoneType in kinds or Any in kinds else True
    if isinstance(value, bool):
        return None if bool in kinds else True
    if scalar and (float in kinds or int in kinds):
        fits = (float in kinds or isinstance(value, int)) and NUMBERS[argument](value)
        return None if fits else True
    if isinstance(value, str) and str in kinds:
        return None if argument in ANY_TEXT and function not in WRONG_TASK or value in WORDS[argument] else True
    if isinstance(value, Path):
        return None if Path in kinds else True
    if isinstance(value, Mapping) and any(get_origin(kind) in (Mapping, dict) for kind in map(real, kinds)):
        return True if not isinstance(value, tlnp.Circuit | tlnp.NodeScores) else None
    if callable(value) and any(get_origin(kind) is Callable for kind in kinds):
        return None
    plain = [kind for kind in map(real, kinds) if isinstance(kind, type)]
    if not isinstance(value, Tensor) and not isinstance(value, type) and any(isinstance(value, kind) for kind in plain):
        of_another = label in ("tokens unknown", "prompts too long", "another model's circuit")
        return True if of_another and has_a_model(function) else None
    return True


def has_a_model(function: str) -> bool:
    names = {parameter.name for parameter in arguments_of(FUNCTIONS[function])}
    return bool(names & {"model", "masks", "circuit_b", "other"}) or function in ("NodeMasks.set_to", "NodeMasks.paired")


def real(kind: Any) -> Any:
    return getattr(kind, "array_type", kind) if get_origin(kind) is None else kind


DOCUMENTED = (FloatingPointError, KeyError, OSError)
CALLED = {"granularities": "granularit", "nodes": "nodes|granularity", "layers": "layer", "wrong_answers": "wrong_answer",
          "answers": "answer", "constants": "constant", "name": "name|ablation|verdict", "hooks": "hook", "gates": "gates|scores",
          "level": "level|granularit", "seeds": "seed", "circuit_a": "circuit", "circuit_b": "circuit"}


def test_every_public_function_is_in_the_table() -> None:
    assert FUNCTIONS.keys() == CALLS.keys()


@pytest.mark.parametrize("name", HERE_CALLS)
def test_a_valid_call_leaves_every_random_generator_and_the_model(world: World, name: str) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index, union-attr]
    call, kwargs = CALLS[name](world)
    call(**kwargs)
    assert torch.equal(before[0], torch.get_rng_state()) and before[2] == random.getstate()
    assert before[1] == np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    assert find_attachment(world.model) is None and world.masks.attached


def as_numpy(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(as_numpy, value))
    kind = None if isinstance(value, bool) else np.int64 if isinstance(value, int) else np.float32 if isinstance(value, float) else None
    return kind(value) if kind and float(kind(value)) == value else value


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HERE_CALLS)
def test_numbers_of_numpy_are_numbers(world: World, name: str) -> None:
    """Seeds from np.arange, budgets from np.geomspace: those of a valid call, and the defaults."""
    call, kwargs = CALLS[name](world)
    defaults = {p.name: p.default for p in arguments_of(FUNCTIONS[name]) if isinstance(p.default, int | float | tuple)}
    call(**{key: as_numpy(value) for key, value in (defaults | kwargs).items()})


TRIED: list[str] = []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HERE_CALLS)
def test_a_wrong_argument_is_named(world: World, name: str) -> None:
    function, documented = FUNCTIONS[name], documentation(FUNCTIONS[name])
    call, kwargs = CALLS[name](world)
    bad = []
    for parameter in arguments_of(function):
        if name == "NodeMasks.prune" and parameter.name == "masks":
            continue
        hint = hints_of(function).get(parameter.name, Any)
        for label, value in values(world).items():
            if not wrong(name, parameter.name, hint, label, value):
                continue
            TRIED.append(f"{name} {parameter.name} {label}")
            try:
                call(**kwargs | {parameter.name: value})
            except Exception as error:
                if problem := badly(error, parameter.name, documented):
                    bad.append(f"{parameter.name}={label}: {problem}")
            else:
                bad.append(f"{parameter.name}={label}: taken")
    assert not bad, "\n" + "\n".join(bad)
    assert find_attachment(world.model) is None and world.masks.attached


def documentation(function: Callable[..., Any]) -> str:
    return inspect.getdoc(function) or ""


def badly(error: Exception, argument: str, documented: str) -> str:
    """What is wrong with an error: its type, where it comes from, or that it does not name the argument."""
    told = f"{type(error).__name__}: {str(error)[:150]}"
    if not isinstance(error, TypeError | ValueError) and not (isinstance(error, DOCUMENTED) and type(error).__name__ in documented):
        return told
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if not frames[-1].startswith(HERE):
        return f"{told} (from {frames[-1]})"
    return "" if re.search(rf"{CALLED.get(argument, argument)}", str(error)) else f"{told} (does not name it)"


def test_so_many_were_tried() -> None:
    """The figure in docs/; run alone, nothing was."""
    assert not TRIED or len(TRIED) > 3000, len(TRIED)
    print(len(TRIED))
