"""Transformers wired by hand, so that the nodes that matter are known, with distractors in every layer.

The residual stream has signal dims, which planted nodes alone write, and junk dims. Every node that is not planted is a distractor: it
reads the whole stream with random weights, so that it differs between clean and corrupted prompts, and writes to junk dims only. No
planted node reads these, and the unembedding does faintly (LEAK), so no distractor has a gradient of exactly 0. There is no
normalisation. The seed draws the distractors' weights and the places of the planted nodes.

`PLANTS[name](seed)` gives a `Plant`. A node is (granularity, layer, *index), as ("head", 0, 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from circuits import full_logits
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

import tl_nodeprune as tlnp
from tl_nodeprune.nodes.attachment import temporary_hooks
from tl_nodeprune.nodes.hooks import answer_logits, mask_hooks
from tl_nodeprune.nodes.probe import find_nodes
from tl_nodeprune.nodes.space import PARENTS, GateKey, NodeSpace

Node = tuple[Any, ...]
Nodes = frozenset[Node]
LEAK, HARD, WIDTH = 0.02, 10.0, 7  # logits per unit of junk; attention score at the place attended; tokens per prompt


@dataclass(frozen=True)
class Plant:
    """A wired model. prompts(n, seed): pairs of its task. truths: sets of planted leaf nodes, any one of which does the task (one
    only, but for the redundant pair). defined: the granularities at which the truth is known."""

    model: Any
    prompts: Callable[[int, int], tlnp.PromptPairs]
    truths: tuple[Nodes, ...]
    defined: tuple[str, ...] = tlnp.GRANULARITIES

    def space(self, granularities: Iterable[str] | None = None) -> NodeSpace:
        return find_nodes(self.model).restrict(granularities)

    def answers(self, space: NodeSpace) -> set[Nodes]:
        """The smallest right circuits among the nodes of a space: the planted leaves and all above them, as far as gated here."""
        known = {frozenset(node for leaf in truth for node in upwards(leaf) if node[0] in space.granularities) for truth in self.truths}
        return {nodes for nodes in known if not any(other < nodes for other in known)}


def upwards(node: Node) -> list[Node]:
    """A node and all above it: an attention neuron, its head, its attention block, its layer."""
    parent = PARENTS.get(node[0])
    return [node] if parent is None else [node, *upwards((parent, *node[1:3 if parent == "head" else 2]))]


def nodes_of(circuit: tlnp.Circuit) -> Nodes:
    """The live nodes of a circuit, of every granularity gated."""
    return frozenset((name, *node) for name in circuit.space.granularities for node in circuit.nodes(name))


def leaves_of(space: NodeSpace) -> list[Node]:
    """Every leaf node of a space."""
    return [(key.granularity, key.layer, *map(int, index)) for key in space.finest() for index in torch.ones(space.shapes[key]).nonzero()]


def circuit_of(space: NodeSpace, leaves: Iterable[Node]) -> tlnp.Circuit:
    """The circuit that keeps these leaf nodes of a space, and what is above them."""
    ends = set(space.finest())
    gates = {key: torch.zeros(shape) if key in ends else torch.ones(shape) for key, shape in space.shapes.items()}
    for name, layer, *index in leaves:
        gates[GateKey(name, layer)][tuple(index)] = 1
    return tlnp.Circuit(space, gates)


def kl_of(plant: Plant, prompts: tlnp.PromptPairs, space: NodeSpace, sets: Sequence[Iterable[Node]]) -> Tensor:
    """Mean KL(full || circuit) in nats of many circuits, each given by the leaf nodes that it keeps, in one forward: [set]."""
    circuits, hooks = [circuit_of(space, leaves) for leaves in sets], space.hooks
    masks = {hook: torch.stack([circuit[hook] for circuit in circuits]).repeat_interleave(len(prompts), 0) for hook in hooks}
    masks = {hook: mask.view(len(mask), 1, *(mask.shape[1:] or (1,))) for hook, mask in masks.items()}
    stand_ins = tlnp.Ablation("interchange").values(plant.model, prompts, hooks)
    stand_ins = {hook: value.repeat(len(sets), *[1] * (value.ndim - 1)) for hook, value in stand_ins.items()}
    rows = torch.arange(len(prompts)).repeat(len(sets))
    with torch.no_grad(), temporary_hooks(plant.model, mask_hooks(hooks, masks.__getitem__, stand_ins.__getitem__)):
        logits = answer_logits(plant.model, prompts.clean[rows], prompts.answer_positions[rows], sliced=False)
    return tlnp.kl_divergence(logits, full_logits(plant.model, prompts)[rows]).view(len(sets), -1).mean(1)


class Wiring:
    """A model that is all distractors, and the means to plant nodes on it. Each `plant_` method returns the leaf nodes it planted."""

    def __init__(self, signals: dict[str, int], *, vocab: int, layers: int = 3, heads: int = 3, d_head: int = 4, d_mlp: int = 12,
                 junk: int = 14, seed: int = 0) -> None:
        self.generator, self.heads, self.d_head, self.d_mlp = torch.Generator().manual_seed(seed), heads, d_head, d_mlp
        self.d_model = sum(signals.values()) + junk
        parts = self.pick(self.d_model, self.d_model).split([*signals.values(), junk])
        self.dims = dict(zip([*signals, "junk"], parts, strict=True))
        self.model = TransformerBridge.boot_native(TransformerBridgeConfig(
            n_layers=layers, d_model=self.d_model, n_heads=heads, d_head=d_head, d_mlp=d_mlp, n_ctx=WIDTH, d_vocab=vocab, act_fn="relu",
            normalization_type=None, seed=0, device="cpu")).eval().requires_grad_(False)
        self.weights = {name.replace("._original_component", ""): p.data for name, p in self.model.named_parameters()}
        for name, weight in self.weights.items():
            weight.copy_(self._distracting(name, weight))

    def _distracting(self, name: str, weight: Tensor) -> Tensor:
        """Random weights that read everything and write junk only; neurons lean to being on."""
        if name.endswith("bias"):
            return self.normal(len(weight)).abs() if "fc_in" in name else torch.zeros_like(weight)
        random, junk = self.normal(*weight.shape), torch.zeros(self.d_model).index_fill(0, self.dims["junk"], 1)
        if name.startswith(("tok_embed", "pos")):
            return random * junk
        if name.startswith("head"):
            return LEAK * random * junk
        random *= weight.shape[1] ** -0.5
        return random * junk[:, None] if "attn.o" in name or "fc_out" in name else random

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def pick(self, of: int, k: int) -> Tensor:
        """k of the first `of` integers, in random order."""
        return torch.randperm(of, generator=self.generator)[:k]

    def read(self, signal: str) -> Tensor:
        """Rows that read the dims of a signal: [dim d_model]."""
        return torch.eye(self.d_model)[self.dims[signal]]

    def embed(self, token: int, **signals: float | Tensor) -> None:
        for name, value in signals.items():
            self.weights["tok_embed.weight"][token, self.dims[name]] = torch.as_tensor(value, dtype=torch.float32)

    def unembed(self, token: int, **signals: float | Tensor) -> None:
        for name, value in signals.items():
            self.weights["head.weight"][token, self.dims[name]] = torch.as_tensor(value, dtype=torch.float32)

    def attend(self, layer: int, head: int, query: Tensor, key: Tensor, strength: float = HARD) -> None:
        """A head's scores: strength * (query @ x) . (key @ y), for rows [n d_model], n at most d_head."""
        scale = (strength * math.sqrt(self.d_head)) ** 0.5
        for name, rows in (("q", query), ("k", key)):
            weight = self.weights[f"layers.{layer}.attn.{name}.weight"][head * self.d_head:][: self.d_head]
            weight.zero_()[: len(rows)] = scale * rows

    def plant_copy(self, layer: int, head: int, source: str, target: str) -> set[Node]:
        """Head dims that move a signal, as it is, from where the head attends."""
        places = self.pick(self.d_head, len(self.dims[source]))
        for place, row, dim in zip(places, self.read(source), self.dims[target], strict=True):
            self.weights[f"layers.{layer}.attn.v.weight"][head * self.d_head + place] = row
            self.weights[f"layers.{layer}.attn.o.weight"][dim, head * self.d_head + place] = 1
        return {("attn_neuron", layer, head, int(place)) for place in places}

    def plant_neurons(self, layer: int, reads: Tensor, biases: Tensor, target: str, writes: Tensor) -> set[Node]:
        """MLP neurons relu(reads @ x + biases) and the output dims that they write: reads [n d_model], writes [dim n]."""
        places, outs = self.pick(self.d_mlp, len(reads)), self.dims[target]
        self.weights[f"layers.{layer}.mlp.fc_in.weight"][places] = reads
        self.weights[f"layers.{layer}.mlp.fc_in.bias"][places] = biases
        self.weights[f"layers.{layer}.mlp.fc_out.weight"][outs[:, None], places] = writes
        return {("mlp_neuron", layer, int(i)) for i in places} | {("mlp_out", layer, int(i)) for i in outs}


def signs(bits: int) -> Tensor:
    """All words of +-1: [2**bits bits]."""
    return torch.tensor([[1.0 if word >> bit & 1 else -1.0 for bit in range(bits)] for word in range(1 << bits)])


def in_noise(clean: Tensor, corrupted: Tensor, answers: Tensor, wrong: Tensor, noise: range,
             generator: torch.Generator) -> tlnp.PromptPairs:
    """Slot tokens [batch slot] at random places among noise that differs between clean and corrupted; a query token (the first after
    the noise) at the end."""
    n = len(clean)
    sides = [torch.randint(noise.start, noise.stop, (n, WIDTH), generator=generator) for _ in range(2)]
    places = torch.rand(n, WIDTH - 1, generator=generator).argsort(1)[:, : clean.shape[1]]
    for side, slots in zip(sides, (clean, corrupted), strict=True):
        side.scatter_(1, places, slots)
        side[:, -1] = noise.stop
    return tlnp.PromptPairs(*sides, answers, wrong)


def two_classes(n: int, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A class per prompt and another one."""
    first = torch.randint(classes, (n,), generator=generator)
    return first, (first + torch.randint(1, classes, (n,), generator=generator)) % classes


def class_prompts(n: int, seed: int, *, classes: int, neutral: int | None = None) -> tlnp.PromptPairs:
    """Subject tokens 0.. have their answers at classes..; corrupted has another subject, or the `neutral` token."""
    generator = torch.Generator().manual_seed(seed)
    subject, other = two_classes(n, classes, generator)
    stand_in = other if neutral is None else torch.full_like(other, neutral)
    noise = range(2 * classes + 1, 2 * classes + 9)
    return in_noise(subject[:, None], stand_in[:, None], subject + classes, other + classes, noise, generator)


def lookup(seed: int = 0) -> Plant:
    """A head in layer 0 copies the subject's two bits to the end; four neurons in layer 1 look up the answer, each for one subject."""
    wiring = Wiring({"one": 1, "subject": 1, "bits": 2, "copied": 2, "answer": 4}, vocab=18, seed=seed)
    wiring.embed(17, one=1)
    for token, word in enumerate(signs(2)):
        wiring.embed(token, subject=1, bits=word)
        wiring.unembed(4 + token, answer=8 * torch.eye(4)[token])
    head = int(wiring.pick(wiring.heads, 1))
    wiring.attend(0, head, wiring.read("one"), wiring.read("subject"))
    leaves = wiring.plant_copy(0, head, "bits", "copied")
    leaves |= wiring.plant_neurons(1, signs(2) @ wiring.read("copied"), -torch.ones(4), "answer", torch.eye(4))
    return Plant(wiring.model, partial(class_prompts, classes=4), (frozenset(leaves),))


def induction(seed: int = 0) -> Plant:
    """... A B ... A -> B: a head in layer 0 moves each token's three bits one place on, a head in layer 1 attends by them."""
    wiring = Wiring({"circle": 2, "bits": 3, "previous": 3, "answer": 3}, vocab=9, seed=seed)
    for token, word in enumerate(signs(3)):
        wiring.embed(token, bits=word)
        wiring.unembed(token, answer=3 * word)
    angles = torch.arange(WIDTH) * 2 * math.pi / WIDTH
    wiring.weights["pos.weight"][:, wiring.dims["circle"]] = torch.stack([angles.cos(), angles.sin()], 1)
    turn = 2 * math.pi / WIDTH
    back = torch.tensor([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    before, matcher = (int(wiring.pick(wiring.heads, 1)) for _ in range(2))
    wiring.attend(0, before, back @ wiring.read("circle"), wiring.read("circle"), 3 * HARD)
    wiring.attend(1, matcher, wiring.read("bits"), wiring.read("previous"), HARD / 3)
    leaves = wiring.plant_copy(0, before, "bits", "previous") | wiring.plant_copy(1, matcher, "bits", "answer")
    return Plant(wiring.model, induction_prompts, (frozenset(leaves),))


def induction_prompts(n: int, seed: int) -> tlnp.PromptPairs:
    """A start token, five different tokens, and one of the first four again; corrupted has it swapped with another of the four."""
    generator, rows = torch.Generator().manual_seed(seed), torch.arange(n)
    clean = torch.full((n, WIDTH), 8)
    clean[:, 1:-1] = torch.rand(n, 8, generator=generator).argsort(1)[:, : WIDTH - 2]
    at, to = (place + 1 for place in two_classes(n, WIDTH - 3, generator))
    clean[:, -1] = clean[rows, at]
    corrupted = clean.clone()
    corrupted[rows, at], corrupted[rows, to] = clean[rows, to], clean[rows, at]
    return tlnp.PromptPairs(clean, corrupted, clean[rows, at + 1], corrupted[rows, to + 1])


def conjunction(seed: int = 0) -> Plant:
    """Heads in layers 0 and 1 each copy a bit to the end, a neuron in layer 1 is their AND; the answer is token 5 if it is on, else 4."""
    wiring = Wiring({"one": 1, "subjects": 2, "bit0": 1, "bit1": 1, "copied": 2, "answer": 1}, vocab=15, seed=seed)
    wiring.dims |= {f"copied{i}": wiring.dims["copied"][i:i + 1] for i in range(2)}
    wiring.embed(14, one=1)
    for token in range(4):
        wiring.embed(token, subjects=torch.eye(2)[token // 2], **{f"bit{token // 2}": token % 2})
    wiring.unembed(5, answer=12)
    wiring.unembed(4, one=6)
    leaves: set[Node] = set()
    for i in range(2):
        head = int(wiring.pick(wiring.heads, 1))
        wiring.attend(i, head, wiring.read("one"), wiring.read("subjects")[i:i + 1])
        leaves |= wiring.plant_copy(i, head, f"bit{i}", f"copied{i}")
    leaves |= wiring.plant_neurons(1, wiring.read("copied").sum(0, keepdim=True), torch.tensor([-1.0]), "answer", torch.ones(1, 1))
    return Plant(wiring.model, conjunction_prompts, (frozenset(leaves),))


def conjunction_prompts(n: int, seed: int) -> tlnp.PromptPairs:
    """Both bits on; corrupted: both off."""
    on, ones = torch.tensor([1, 3]).expand(n, 2), torch.ones(n, dtype=torch.long)
    return in_noise(on, on - 1, 5 * ones, 4 * ones, range(6, 14), torch.Generator().manual_seed(seed))


def redundant(seed: int = 0, copies: int = 2) -> Plant:
    """A head in each of the first layers copies the subject's two bits to the same dims, and one is enough; corrupted has a neutral
    subject."""
    wiring = Wiring({"one": 1, "subject": 1, "bits": 2, "answer": 2}, vocab=18, seed=seed)
    wiring.embed(17, one=1)
    wiring.embed(8, subject=1)
    for token, word in enumerate(signs(2)):
        wiring.embed(token, subject=1, bits=word)
        wiring.unembed(4 + token, answer=5 * word)
    heads = []
    for layer in range(copies):
        head = int(wiring.pick(wiring.heads, 1))
        wiring.attend(layer, head, wiring.read("one"), wiring.read("subject"))
        heads.append(copied_in_order(wiring, layer, head))
    answers = {frozenset((one[0], other[1])) for one in heads for other in heads}  # a bit from each of two heads is as small
    return Plant(wiring.model, partial(class_prompts, classes=4, neutral=8), tuple(sorted(answers, key=sorted)))


def copied_in_order(wiring: Wiring, layer: int, head: int) -> list[Node]:
    """Plant the copy of "bits" to "answer"; the leaf nodes in order of the bits."""
    leaves = wiring.plant_copy(layer, head, "bits", "answer")
    written = wiring.weights[f"layers.{layer}.attn.o.weight"][wiring.dims["answer"]]
    return sorted(leaves, key=lambda leaf: int(written[:, head * wiring.d_head + leaf[3]].argmax()))


def blocks(seed: int = 0) -> Plant:
    """The attention block of layer 1 copies the subject's code, spread over all dims of all heads; the MLP of layer 2 looks up the
    answer, spread over all neurons and 16 output dims. Finer than blocks the truth is not defined; layers 0 and 3 are distractors."""
    n, dims = 8, 16
    wiring = Wiring({"one": 1, "subject": 1, "code": n, "copied": n, "answer": dims}, vocab=26, layers=4, heads=4, d_mlp=32, seed=seed)
    codes, targets = math.sqrt(n) * torch.nn.functional.normalize(wiring.normal(n, n)), wiring.normal(n, dims)
    wiring.embed(25, one=1)
    for token in range(n):
        wiring.embed(token, subject=1, code=codes[token])
        wiring.unembed(n + token, answer=8 * torch.linalg.pinv(targets)[:, token])
    for head in range(wiring.heads):
        wiring.attend(1, head, wiring.read("one"), wiring.read("subject"))
    spread = wiring.normal(wiring.heads * wiring.d_head, n)
    wiring.weights["layers.1.attn.v.weight"].copy_(spread @ wiring.read("code"))
    wiring.weights["layers.1.attn.o.weight"][wiring.dims["copied"]] = torch.linalg.pinv(spread)
    reads, biases = wiring.normal(wiring.d_mlp, n), wiring.normal(wiring.d_mlp)
    neurons = (codes @ reads.T + biases).relu()
    wiring.plant_neurons(2, reads @ wiring.read("copied"), biases, "answer", (torch.linalg.pinv(neurons) @ targets).T)
    truth = frozenset({("attn", 1), ("mlp", 2)})
    return Plant(wiring.model, partial(class_prompts, classes=n), (truth,), ("layer", "attn", "mlp"))


PLANTS: dict[str, Callable[[int], Plant]] = {
    "lookup": lookup, "induction": induction, "conjunction": conjunction, "redundant": redundant, "blocks": blocks,
}
