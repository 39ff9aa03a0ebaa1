"""plotly figures show the circuit's own numbers, at any depth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from torch import Tensor

import tl_nodeprune as tlnp
from tl_nodeprune.circuit.effects import Effects
from tl_nodeprune.circuit.evaluation import Metrics
from tl_nodeprune.nodes.space import GateKey, NodeSpace
from tl_nodeprune.search.result import Step
from tl_nodeprune.search.sweep import SweepRun
from tl_nodeprune.viz.values import effect_of

SHAPES = {"layer": (), "attn": (), "mlp": (), "head": (3,), "attn_neuron": (3, 4), "mlp_neuron": (8,), "mlp_out": (5,)}


def space_of(layers: int, only: tuple[str, ...] = tuple(SHAPES)) -> NodeSpace:
    present = {GateKey(name, layer): shape for layer in range(layers) for name, shape in SHAPES.items()}
    shapes = {key: shape for key, shape in present.items() if key.granularity in only}
    return NodeSpace(shapes, present, d_model=5, n_layers=layers, kv_heads=3, gated_mlp=False, model_name="small")


def random_circuit(layers: int = 3, seed: int = 0, only: tuple[str, ...] = tuple(SHAPES)) -> tlnp.Circuit:
    space, g = space_of(layers, only), torch.Generator().manual_seed(seed)
    return tlnp.Circuit(space, {key: torch.rand(shape, generator=g) < 0.7 for key, shape in space.shapes.items()})


def random_effects(circuit: tlnp.Circuit) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {hook: torch.randn(mask.shape, generator=g) for hook, mask in circuit.items()}


def shown(trace: Any, row: int = 0) -> str:
    """What hovering a point of a trace says, as plotly fills the template in."""
    text = trace.hovertemplate
    for i, value in enumerate(trace.customdata[row]):
        text = text.replace(f"%{{customdata[{i}]:d}}", f"{value:.0f}").replace(f"%{{customdata[{i}]:.4~g}}", f"{value:.4g}")
    return str(text).removesuffix("<extra></extra>")


@pytest.mark.parametrize("layers", [2, 80])
def test_every_figure_at_any_depth(layers: int) -> None:
    circuit, other = random_circuit(layers), random_circuit(layers, seed=2)
    effects, viz = random_effects(circuit), tlnp.viz
    figures = [viz.mask_map(circuit, effects=effects, scores=effects, task="t<i>"), viz.neuron_map(circuit, effects=effects, task="t<i>"),
               viz.circuit_graph(circuit, effects=effects, task="t<i>"), viz.agreement(circuit, effects, task="t<i>"),
               viz.compare(circuit, other, task="t<i>")]
    for figure in figures:
        assert isinstance(figure, go.Figure)
        assert figure.to_json()
        text = figure.layout.title.text
        assert "t&lt;i&gt;" in text and "interchange ablation" in text and f"{circuit.size_total:,} leaf nodes" in text
    assert figures[0].layout.height >= 16 * layers and figures[2].layout.height >= 16 * layers  # a row stays readable


def test_mask_map_says_name_score_and_effect_of_heads_and_blocks() -> None:
    circuit = random_circuit()
    effects, scores = random_effects(circuit), {hook: torch.rand(mask.shape) for hook, mask in circuit.items()}
    heads, shares = tlnp.viz.mask_map(circuit, effects=effects, scores=scores).data
    z = "blocks.1.attn.hook_z"
    assert heads.hovertext[1][2] == (f"head 1.2: {int(circuit[z][2].sum())} of 4 dims live<br>score {float(scores[z][2].max()):.4g}"
                                     f"<br>effect {float(effects[z][2].sum()):.4g}")
    block = "blocks.2.hook_attn_out"
    state = "live" if circuit[block] else "pruned"
    assert shares.hovertext[2][1] == f"attn 2: {state}<br>score {float(scores[block]):.4g}<br>effect {float(effects[block]):.4g}"
    live = circuit.live("mlp_neuron", 0)
    assert shares.hovertext[0][5] == f"layer 0: {int(live.sum())} of 8 MLP neurons live ({float(live.float().mean()):.1%})"


def test_mask_map_where_layers_differ() -> None:
    """Attention in one layer only, as hybrids have it."""
    full = space_of(3)
    shapes = {key: shape for key, shape in full.shapes.items() if key.layer == 1 or key.granularity in ("layer", "mlp", "mlp_neuron")}
    circuit = tlnp.Circuit.full(NodeSpace(shapes, shapes, d_model=5, n_layers=3, kv_heads=3, gated_mlp=False))
    heads, shares = tlnp.viz.mask_map(circuit).data
    np.testing.assert_array_equal(np.isnan(np.array(heads.z, dtype=float)), [[True] * 3, [False] * 3, [True] * 3])
    assert heads.hovertext[0] == ["head 0.0: not gated", "head 0.1: not gated", "head 0.2: not gated"]
    assert "attn 0: not gated" in shares.hovertext[0]


@pytest.mark.parametrize("name", ["mlp_neuron", "attn_neuron", "mlp_out"])
def test_neuron_map_has_a_point_per_live_neuron(name: str) -> None:
    circuit = random_circuit()
    effects = random_effects(circuit)
    points, bars = tlnp.viz.neuron_map(circuit, name, effects=effects).data
    width = SHAPES[name][-1]
    flat = [(layer, index[0] * width + index[1] if len(index) == 2 else index[0]) for layer, *index in circuit.nodes(name)]
    assert list(zip(points.y, points.x, strict=True)) == flat
    layer, *index = circuit.nodes(name)[2]
    effect = float(effects[GateKey(name, layer).hook][tuple(index)])
    assert shown(points, 2) == f"{name} {'.'.join(map(str, (layer, *index)))}<br>effect {effect:.4g}"
    assert points.marker.color[2] == pytest.approx(effect) and points.marker.cmid == 0
    np.testing.assert_allclose(bars.x, [float(circuit.live(name, layer).float().mean()) for layer in range(3)])


def test_neuron_map_of_a_hundred_thousand() -> None:
    shapes = {GateKey("mlp_neuron", layer): (12_500,) for layer in range(16)}
    space = NodeSpace(shapes, shapes, d_model=4, n_layers=16, kv_heads=1, gated_mlp=False)
    circuit = tlnp.Circuit(space, {key: torch.arange(12_500) % 2 for key in shapes})
    figure = tlnp.viz.neuron_map(circuit)
    assert len(figure.data[0].x) == 100_000 and figure.data[0].type == "scattergl"
    assert len(figure.to_json()) < 6_000_000


def test_circuit_graph_has_the_kept_heads_and_mlps() -> None:
    circuit = random_circuit()
    effects = {hook: torch.full_like(mask, 0.1) for hook, mask in circuit.items()}
    _, *lines, heads, mlps = tlnp.viz.circuit_graph(circuit, effects=effects | {"blocks.0.hook_mlp_out": torch.full((5,), -2.0)}).data
    assert list(heads.text) == [f"{layer}.{head}" for layer, head in circuit.nodes("head")]
    assert list(mlps.text) == [str(layer) for (layer,) in circuit.nodes("mlp")]
    assert sum(len(line.x) for line in lines) == 3 * (len(heads.text) + len(mlps.text)), "a line per node, all to the stream"
    widths = {x: line.line.width for line in lines for x in zip(line.x[::3], line.y[::3], strict=True)}
    assert mlps.text[0] == "0" and widths[mlps.x[0], mlps.y[0]] == 5 and widths[heads.x[0], heads.y[0]] == 1
    assert heads.hovertext[0].endswith("dims live<br>effect 0.1") and mlps.hovertext[0].endswith("<br>effect -2")


@pytest.mark.parametrize(("only", "label"), [(("attn",), "attention blocks"), (("layer",), "layers"), (("mlp_neuron",), "MLPs"),
                                             (("attn_neuron",), "heads"), (("mlp_out",), "MLPs")])
def test_circuit_graph_of_one_granularity(only: tuple[str, ...], label: str) -> None:
    assert tlnp.viz.circuit_graph(tlnp.Circuit.full(space_of(2, only))).data[-1].name == label


def test_circuit_graph_of_layers_above_what_is_not_gated() -> None:
    """Their attention is not gated, so a layer stands for itself beside its MLP; the circuit is not empty."""
    space = space_of(3, ("layer", "mlp"))
    gates = {key: torch.tensor(key.granularity == "layer" and key.layer < 2 or key == ("mlp", 1)) for key in space.shapes}
    circuit = tlnp.Circuit(space, gates)
    assert (circuit.size, circuit.size_total, circuit.sparsity) == (3, 6, 0.5)
    marks = {trace.name: list(trace.text) for trace in tlnp.viz.circuit_graph(circuit).data if trace.text}
    assert marks == {"MLPs": ["1"], "layers": ["0", "1"]}


def test_circuit_graph_tells_nodes_that_were_not_measured() -> None:
    circuit = random_circuit()
    effects = {hook: torch.full_like(mask, 0.1) for hook, mask in circuit.items() if hook.endswith("hook_z")}
    *_, heads, mlps = tlnp.viz.circuit_graph(circuit, effects=effects).data
    assert heads.marker.coloraxis == "coloraxis" and mlps.marker.coloraxis is None
    assert isinstance(mlps.marker.color, str) and mlps.hovertext[0].endswith("<br>effect not measured")


def test_compare_by_hand() -> None:
    a, b = random_circuit(), random_circuit(seed=5)
    figure = tlnp.viz.compare(a, b, names=("one", "<two>"))
    heads, shares = figure.data[0], figure.data[-1]
    kept = [[sum(2**i * int(c.live("head", layer)[head]) for i, c in enumerate((a, b))) for head in range(3)] for layer in range(3)]
    assert np.array(heads.z).astype(int).tolist() == kept
    words = {0: "in neither", 1: "only in one", 2: "only in &lt;two&gt;", 3: "in both"}
    assert heads.hovertext[1][2] == f"head 1.2: {words[kept[1][2]]}"
    one, two = a.live("mlp_neuron", 0), b.live("mlp_neuron", 0)
    assert shares.z[0][5] == pytest.approx(float((one & two).sum() / (one | two).sum()))
    assert f"intersection over union {a.iou(b):.2f}" in figure.layout.title.text
    assert shares.text[0][5] == f"{shares.z[0][5]:.2g}"
    assert np.nanmin(np.array(tlnp.viz.compare(a, a).data[-1].z, dtype=float)) == 1
    blocks = tlnp.viz.compare(a, b, effects={"blocks.0.hook_attn_out": torch.tensor(0.25)}).data[-1]
    word = ("in neither", "only in a", "only in b", "in both")[int(a.live("attn", 0)) + 2 * int(b.live("attn", 0))]
    assert blocks.hovertext[0][1] == f"attn 0: {word}<br>effect 0.25"


STEPS = [Step(i, 2.0 / (i + 1), 100 - i, 0.1 * i) for i in range(20)]


def result_of(circuit: tlnp.Circuit, converged: bool | None, kl: float, history: list[Step], **fields: Any) -> tlnp.PruneResult:
    return tlnp.PruneResult(circuit=circuit, converged=converged, kl=kl, search_kl=0.5 * kl, history=history, seconds=3.0, peak_memory=0,
                            **fields)


def test_history_shows_every_step() -> None:
    figure = tlnp.viz.history(result_of(random_circuit(), False, 0.09, STEPS), task="ioi")
    *each, median = figure.data
    assert [list(trace.y) for trace in each] == [[getattr(s, name) for s in STEPS] for name in ("kl", "size", "coefficient")]
    assert figure.data[0].text[3] == "step 3<br>KL 0.5<br>97 nodes open<br>coefficient 0.3"
    assert "KL 0.09 nats held out, in 3 s, not converged" in figure.layout.title.text and "ioi" in figure.layout.title.text
    assert figure.layout.yaxis.title.text == "KL, nats" and figure.layout.shapes[0].y0 == 0.09 and median.mode == "lines"
    untested = tlnp.viz.history(result_of(random_circuit(), None, 0.09, STEPS, loss="shortfall"))
    assert "The search: shortfall 0.09 held out, in 3 s, untested" in untested.layout.title.text
    assert untested.layout.yaxis.title.text == "shortfall" and untested.data[0].text[3].startswith("step 3<br>shortfall 0.5<br>")
    assert "converged" not in tlnp.viz.history(result_of(random_circuit(), True, 0.09, STEPS)).layout.title.text


def test_history_has_a_running_median_over_noisy_steps() -> None:
    """A single step far off does not move it."""
    steps = [Step(i, 100.0 if i == 30 else 1.0, 50, 1.0) for i in range(60)]
    median = tlnp.viz.history(result_of(random_circuit(), True, 1.0, steps)).data[-1]
    assert set(median.y) == {1.0} and len(median.y) == 60


TABLE = pd.DataFrame({"nodes": [5, 20, 50, 123], "share": [0.04, 0.16, 0.41, 1.0], "search_kl": [2.0, 0.4, 0.02, 0.0],
                      "kl": [3.0, 0.5, 0.06, 0.0], "low": [2.5, 0.4, 0.04, 0.0], "high": [3.5, 0.7, 0.09, 0.0],
                      "accuracy": [0.5, 0.9, 1.0, 1.0]})


def test_frontier_of_one_run() -> None:
    """KL held out with its interval, KL on the prompts searched, and the circuit."""
    circuit = random_circuit()
    result = result_of(circuit, True, 0.05, STEPS, frontier=TABLE, interval=(0.04, 0.06), accuracy=0.98)
    figure = tlnp.viz.frontier(result, task="ioi")
    band, held_out, searched, mark = figure.data
    assert list(held_out.x) == list(TABLE["nodes"]) and list(held_out.y) == list(TABLE["kl"]) and held_out.opacity is None
    assert list(searched.y) == list(TABLE["search_kl"]) and searched.opacity < 1
    assert searched.name == "tl_nodeprune, interchange, prompts searched"
    assert list(band.x) == [5, 20, 50, 50, 20, 5] and list(band.y) == [3.5, 0.7, 0.09, 0.04, 0.4, 2.5] and band.fill == "toself"
    assert (list(mark.x), list(mark.y), mark.marker.symbol) == ([circuit.size], [0.05], "diamond")
    assert held_out.text[1] == ("tl_nodeprune, interchange<br>20 leaf nodes<br>KL 0.5 nats held out (90 %: 0.4 to 0.7)<br>"
                                "0.4 on the prompts searched<br>16.00% of the nodes, 90% answered right")
    assert figure.layout.yaxis.type == "log", "the full model's KL of 0 is not on it, and the rest is"
    assert "ioi · KL on held-out prompts" in figure.layout.title.text


def test_frontier_ends_where_it_says_nothing_more() -> None:
    tiny = TABLE.assign(kl=[3.0, 0.5, 1e-6, 1e-9])
    low, _ = tlnp.viz.frontier(result_of(random_circuit(), True, 0.05, [], frontier=tiny)).layout.yaxis.range
    assert low == -4


def test_frontier_without_an_interval_or_of_an_own_loss() -> None:
    few = TABLE.assign(low=float("nan"), high=float("nan"))
    figure = tlnp.viz.frontier(result_of(random_circuit(), None, 0.05, [], frontier=few, loss="lost <b>"), names=("one",))
    assert [trace.name for trace in figure.data] == ["one", "one, prompts searched", "one, the circuit"]
    assert figure.layout.yaxis.title.text == "lost &lt;b&gt;" and "lost &lt;b&gt; 0.5 held out" in figure.data[0].text[1]


def some_sweep(only: tuple[str, ...] = tuple(SHAPES)) -> tlnp.Sweep:
    metrics = [Metrics(kl, 1.0, 2.0, 1.0) for kl in (0.1, 0.3, 0.2)]
    evaluations = [tlnp.Evaluation(m, m, m, 1.0, "zero", 4) for m in metrics]
    circuits = [tlnp.Circuit(c.space, {k: c.live(*k) for k in c.space.shapes}, tlnp.Ablation("zero"))
                for c in (random_circuit(seed=seed, only=only) for seed in range(3))]
    return tlnp.Sweep(tuple(SweepRun(0.05, seed, result_of(circuit, True, 0.05, []), evaluation)
                            for seed, (circuit, evaluation) in enumerate(zip(circuits, evaluations, strict=True))))


def test_frontier_of_a_sweep_beside_a_table() -> None:
    sweep = some_sweep()
    table = pd.DataFrame({"size": [20, 10], "kl": [0.1, 0.4], "method": "EAP <b>"})
    medians, runs, others = tlnp.viz.frontier(sweep, table).data
    assert runs.opacity < 1 and runs.text[0].split("<br>")[0] in {f"tl_nodeprune, zero, seed {seed}, max_kl 0.05" for seed in range(3)}
    assert sorted(runs.y) == [0.1, 0.2, 0.3] and list(medians.y) == [0.2] and medians.name == "tl_nodeprune, zero"
    assert list(medians.x) == list(sweep.frontier()["nodes"])
    assert list(others.x) == [10, 20] and list(others.y) == [0.4, 0.1] and others.name == "EAP &lt;b&gt;"
    assert tlnp.viz.frontier(table).layout.yaxis.type == "log"
    assert tlnp.viz.frontier(table.assign(kl=0.0)).layout.yaxis.type == "linear"  # a log axis would drop the point


def test_frontier_tells_sweeps_apart() -> None:
    one, other = some_sweep(), some_sweep(("head",))
    assert [t.name for t in tlnp.viz.frontier(one, other).data[::2]] == ["tl_nodeprune, all nodes; zero", "tl_nodeprune, head; zero"]
    assert [t.name for t in tlnp.viz.frontier(one, one).data[::2]] == ["tl_nodeprune, zero (1)", "tl_nodeprune, zero (2)"]
    assert [t.name for t in tlnp.viz.frontier(one, other, names=("all", "heads")).data[::2]] == ["all", "heads"]
    with pytest.raises(ValueError, match="give 2, one for each PruneResult and Sweep, all different"):
        tlnp.viz.frontier(one, other, names=("all", "all"))


def test_agreement_ranks_by_absolute_effect() -> None:
    space = space_of(1, ("head",))
    circuit = tlnp.Circuit(space, {GateKey("head", 0): torch.tensor([1, 0, 1])})
    effects = {"blocks.0.attn.hook_z": torch.tensor([-3.0, 1.0, 2.0])[:, None].expand(3, 4)}
    figure = tlnp.viz.agreement(circuit, effects)
    assert list(figure.data[0].y) == [-3, 2, 1] and list(figure.data[0].marker.color) == [1, 1, 0]
    assert [shown(figure.data[0], row) for row in range(3)] == ["head 0.0<br>effect -3", "head 0.2<br>effect 2", "head 0.1<br>effect 1"]
    assert "AUROC 1 (2 kept, 1 pruned)" in figure.layout.annotations[0].text
    assert "AUROC 0 " in tlnp.viz.agreement(~circuit, effects).layout.annotations[0].text
    assert "undefined, since all of them" in tlnp.viz.agreement(tlnp.Circuit.full(space), effects).layout.annotations[0].text


def test_effects_of_coarse_and_fine_nodes() -> None:
    """A mapping that is flat within heads is about heads; one that is not is about dims, and a head's is their sum."""
    circuit, hook = random_circuit(1), "blocks.0.attn.hook_z"
    head, dims = GateKey("head", 0), GateKey("attn_neuron", 0)
    flat, uneven = torch.tensor([1.0, 2, 3])[:, None].expand(3, 4), torch.arange(12.0).view(3, 4)
    assert effect_of(circuit, head, {hook: flat}).tolist() == [1, 2, 3] and effect_of(circuit, dims, {hook: flat}) is None
    assert effect_of(circuit, head, {hook: uneven}).tolist() == uneven.sum(1).tolist()
    assert effect_of(circuit, dims, {hook: uneven}).equal(uneven)
    assert effect_of(circuit, GateKey("mlp", 0), {"blocks.0.hook_mlp_out": torch.full((5,), 2.0)}) == 2
    measured = Effects({head: torch.tensor([1.0, 1, 1])}, space_of(1, ("head",)), "denoise", "activation patching", 1.0, 0.0, 1)
    assert effect_of(circuit, head, measured).tolist() == [1, 1, 1] and effect_of(circuit, dims, measured) is None


def test_agreement_as_crosscheck_counts_it() -> None:
    circuit = random_circuit()
    gates = {key: torch.randn(shape, generator=torch.Generator().manual_seed(key.layer)) for key, shape in circuit.space.shapes.items()}
    effects = Effects(gates, circuit.space, "denoise", "attribution patching", 1.0, 0.0, 1)
    table = tlnp.crosscheck.agreement(circuit, effects)
    said = {note.text.split(":")[0]: note.text for note in tlnp.viz.agreement(circuit, effects).layout.annotations}
    for name, title in (("head", "heads"), ("attn_neuron", "attention neurons"), ("mlp_neuron", "MLP neurons")):
        assert f"AUROC {table.of(name).auroc:.3g} (" in said[title]


def test_agreement_and_compare_say_scores_and_effects() -> None:
    circuit = random_circuit()
    effects, scores = random_effects(circuit), {hook: torch.rand(mask.shape) for hook, mask in circuit.items()}
    assert "<br>score " in shown(tlnp.viz.agreement(circuit, effects, scores=scores).data[0])
    heads = tlnp.viz.compare(circuit, ~circuit, scores=scores, effects=effects).data[0]
    z = "blocks.1.attn.hook_z"
    assert heads.hovertext[1][2].endswith(f"<br>score {float(scores[z][2].max()):.4g}<br>effect {float(effects[z][2].sum()):.4g}")


def test_scores_of_heads_are_one_per_head() -> None:
    """As `rank` gives them where heads are the finest nodes, while a mask there is [head, d_head]."""
    circuit = random_circuit(only=("head", "mlp"))
    scores = tlnp.NodeScores.from_flat(torch.arange(12.0), circuit.space)
    assert scores["blocks.1.attn.hook_z"].shape == (3,) and circuit["blocks.1.attn.hook_z"].shape == (3, 4)
    table = tlnp.viz.node_table(circuit, scores=scores, live=False).set_index("node")
    assert table.loc["head 1.2", "score"] == float(scores["blocks.1.attn.hook_z"][2])
    assert "<br>score " in tlnp.viz.mask_map(circuit, scores=scores).data[0].hovertext[1][2]
    assert tlnp.viz.circuit_graph(circuit, scores=scores)


def test_effects_of_heads_show_where_only_their_dims_are_gated() -> None:
    circuit, space = random_circuit(only=("attn_neuron",)), space_of(3, ("head",))
    gates = {key: torch.tensor([1.0, 2, 3]) + 10 * key.layer for key in space.shapes}
    effects = Effects(gates, space, "denoise", "activation patching", 1.0, 0.0, 1)
    assert tlnp.viz.mask_map(circuit, effects=effects).data[0].hovertext[2][1].endswith("<br>effect 22")
    assert not tlnp.viz.circuit_graph(circuit, effects=effects).layout.showlegend  # by effect, not by share


def test_node_table_lists_what_is_kept() -> None:
    circuit = random_circuit()
    effects = random_effects(circuit)
    table = tlnp.viz.node_table(circuit, effects=effects)
    assert table["granularity"].value_counts().to_dict() == circuit.count()
    row = table[table["node"] == "attn_neuron {}.{}.{}".format(*circuit.nodes("attn_neuron")[3])].iloc[0]
    layer, head, dim = circuit.nodes("attn_neuron")[3]
    assert row["layer"] == layer and row["index"] == f"{head}.{dim}"
    assert row["effect"] == pytest.approx(float(effects[f"blocks.{layer}.attn.hook_z"][head, dim]))
    everything = tlnp.viz.node_table(circuit, live=False)
    assert everything["live"].sum() == len(table) and len(everything) == sum(circuit.space.totals().values())
    assert "effect" not in everything and len(tlnp.viz.node_table(tlnp.Circuit.empty(circuit.space))) == 0


def test_an_empty_circuit() -> None:
    empty = tlnp.Circuit.empty(space_of(2))
    assert "0 of 50 leaf nodes live" in tlnp.viz.mask_map(empty).layout.title.text
    with pytest.raises(ValueError, match="none of the 16 MLP neurons of this circuit is live"):
        tlnp.viz.neuron_map(empty)
    with pytest.raises(ValueError, match="the circuit is empty"):
        tlnp.viz.circuit_graph(empty)
    assert "undefined, since none of them" in tlnp.viz.agreement(empty, random_effects(empty)).layout.annotations[0].text
    nothing = tlnp.viz.compare(empty, empty).data[-1]
    assert np.isnan(np.array(nothing.z, dtype=float)).all() and {text for row in nothing.text for text in row} == {""}


CIRCUIT = random_circuit()


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda viz: viz.mask_map("c.safetensors"), TypeError, "circuit must be a Circuit, a PruneResult or a Report, got str; .*Circuit.load"),
    (lambda viz: viz.compare(CIRCUIT, None), TypeError, "circuit_b must be a Circuit, a PruneResult or a Report, got NoneType"),
    (lambda viz: viz.compare(CIRCUIT, random_circuit(2)), ValueError, "the two circuits are over different nodes"),
    (lambda viz: viz.mask_map(CIRCUIT, effects=torch.ones(3)), TypeError, "effects must be a mapping from hook name to tensor, got Tensor"),
    (lambda viz: viz.circuit_graph(CIRCUIT, scores={"head": torch.ones(3)}), ValueError,
     "scores has none of this circuit's hooks: it has head"),
    (lambda viz: viz.neuron_map(CIRCUIT, effects={"blocks.0.attn.hook_z": torch.ones(2, 4)}), ValueError,
     r"effects\['blocks.0.attn.hook_z'\] is \[2, 4\], the circuit's mask there is \[3, 4\]"),
    (lambda viz: viz.neuron_map(CIRCUIT, "head"), ValueError, "granularity='head'; neuron_map shows mlp_neuron, attn_neuron, mlp_out"),
    (lambda viz: viz.neuron_map(random_circuit(only=("head",))), ValueError, "no neuron nodes; it has head"),
    (lambda viz: viz.history(CIRCUIT), TypeError, "result must be a PruneResult, got Circuit"),
    (lambda viz: viz.history(result_of(CIRCUIT, True, 0.1, [])), ValueError, "history of this result is empty"),
    (lambda viz: viz.frontier(), ValueError, "frontier needs a PruneResult, a Sweep, or a DataFrame"),
    (lambda viz: viz.frontier([1]), TypeError, "frontier takes a PruneResult, a Sweep or a DataFrame, got list as source 0"),
    (lambda viz: viz.frontier(result_of(CIRCUIT, True, 0.1, [])), ValueError, "this result has no frontier: it is an objective's"),
    (lambda viz: viz.frontier(some_sweep(), result_of(CIRCUIT, True, 0.1, [], frontier=TABLE, loss="lost")), ValueError,
     "these sources measure different losses, KL and lost"),
    (lambda viz: viz.frontier(pd.DataFrame({"size": [1], "KL": [1]})), ValueError, "source 0 has no column kl, method"),
    (lambda viz: viz.frontier(pd.DataFrame({"size": [], "kl": [], "method": []})), ValueError, "no run and no point"),
    (lambda viz: viz.agreement(CIRCUIT, None), TypeError, "effects must be a mapping from hook name to tensor, got NoneType"),
    (lambda viz: viz.agreement(random_circuit(only=("attn_neuron",)), {"blocks.0.attn.hook_z": torch.ones(3, 4)}), ValueError,
     "effects has no attn_neuron nodes to compare"),
    (lambda viz: viz.node_table({}), TypeError, "got dict"),
])
def test_refuses(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call(tlnp.viz)


def test_figures_leave_the_template_to_their_user() -> None:
    """Restyled in one line, and nothing set for other figures."""
    figure = tlnp.viz.mask_map(random_circuit())
    assert figure.layout.template.layout.to_plotly_json() == go.Figure().layout.template.layout.to_plotly_json()
    assert figure.update_layout(template="plotly_dark").layout.template.layout.paper_bgcolor == "rgb(17,17,17)"
