"""`report`: every number against another way to it, what it claims where nothing can be claimed, and bad input."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from circuits import circuit_logits, full_logits
from scipy import stats

import tl_nodeprune as tlnp
from tl_nodeprune.evidence.units import Unit, closed
from tl_nodeprune.masks.ablation import ABLATIONS
from tl_nodeprune.nodes.probe import find_nodes
from tl_nodeprune.nodes.space import GateKey

Toy = tuple[Any, tlnp.PromptPairs]
VERDICTS = ["task", "faithfulness", "completeness", "random circuits", "equivalence", "independence", "minimality", "redundancy",
            "ablations"]
QUICK = {"n_random": 49, "n_subsets": 4, "batch_size": 256, "progress": False}
CHEAP = QUICK | {"n_random": 4, "n_subsets": 2, "max_units": 3}
KEPT = (("head", 0, 0), ("head", 0, 1), ("head", 0, 2), ("head", 1, 0), ("head", 1, 1), ("head", 1, 2), ("head", 1, 3), ("mlp", 0))


def circuit_with(model: Any, kept: Any = KEPT, ablation: tlnp.Ablation | None = None) -> tlnp.Circuit:
    space = find_nodes(model).restrict(("head", "mlp"))
    gates = {key: torch.zeros(shape) for key, shape in space.shapes.items()}
    for granularity, layer, *index in kept:
        gates[GateKey(granularity, layer)][tuple(index)] = 1
    return tlnp.Circuit(space, gates, ablation or tlnp.Ablation())


@pytest.fixture(scope="module")
def found(toy: Toy) -> tlnp.Report:
    return tlnp.report(toy[0], circuit_with(toy[0]), toy[1], **QUICK)


def test_it_is_what_evaluate_says_of_circuit_and_complement(toy: Toy, found: tlnp.Report) -> None:
    model, prompts = toy
    circuit = circuit_with(model)
    plain, without = tlnp.evaluate(model, circuit, prompts), tlnp.evaluate(model, ~circuit, prompts)
    assert found.evaluation == plain and found.searched is None
    assert found.completeness.complement.kl == pytest.approx(without.kl, abs=1e-3)
    assert found.completeness.left == pytest.approx(without.faithfulness, abs=1e-4)
    for name, (low, high) in found.intervals.items():
        assert low <= getattr(plain, name) <= high and (low < high or name == "exact_match"), name


def test_intervals_by_hand(toy: Toy, found: tlnp.Report) -> None:
    """Resampled prompts, drawn here another way, give the same ends but for chance: those of the bias-corrected and accelerated
    bootstrap (Efron 1987). Shares have Wilson's in closed form."""
    model, prompts = toy
    circuit = circuit_with(model)
    n, rng = len(prompts), np.random.default_rng(7)
    whole, alone, none = (prompts.logit_diff(logits).double().numpy() for logits in (
        full_logits(model, prompts), circuit_logits(model, circuit, prompts),
        circuit_logits(model, tlnp.Circuit.empty(circuit.space, circuit.ablation), prompts)))
    kl = np.array([tlnp.evaluate(model, circuit, prompts[i : i + 1]).kl for i in range(n)])
    draws = [rng.choice(n, n) for _ in range(4000)]
    measures = {"kl": lambda rows: kl[rows].mean(), "logit_diff": lambda rows: alone[rows].mean(),
                "faithfulness": lambda rows: (alone[rows] - none[rows]).mean() / (whole[rows] - none[rows]).mean()}
    for name, measure in measures.items():
        values, left_out = np.array([measure(rows) for rows in draws]), np.array([measure(np.delete(np.arange(n), i)) for i in range(n)])
        bias, pull = stats.norm.ppf((values < measure(np.arange(n))).mean()), left_out.mean() - left_out
        skew = (pull**3).sum() / (6 * (pull**2).sum() ** 1.5)
        at = [stats.norm.cdf(bias + (bias + z) / (1 - skew * (bias + z))) for z in (-1.959964, 1.959964)]
        low, high = np.quantile(values, at)
        assert found.intervals[name] == pytest.approx((low, high), abs=0.1 * (high - low)), name
    z, p = 1.959964, float((alone > 0).mean())
    middle, half = (p + z**2 / 2 / n) / (1 + z**2 / n), z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / 4 / n**2)
    assert found.intervals["accuracy"] == pytest.approx((middle - half, middle + half), abs=1e-6)


def test_removing_a_unit_and_ablations_by_hand(toy: Toy, found: tlnp.Report) -> None:
    model, prompts = toy
    circuit = circuit_with(model)
    assert len(found.effects) == 8 and found.effects["kl_rise"].is_monotonic_decreasing
    itself = prompts.logit_diff(circuit_logits(model, circuit, prompts))
    for unit in (Unit("head", 0, (2,)), Unit("mlp", 0)):
        less = closed(circuit, [unit])
        row = found.effects.loc[str(unit)]
        assert row["kl_rise"] == pytest.approx(tlnp.evaluate(model, less, prompts).kl - found.evaluation.kl, rel=1e-3)
        change = (prompts.logit_diff(circuit_logits(model, less, prompts)) - itself).abs().mean()
        assert row["score_change"] == pytest.approx(float(change), rel=1e-3)
    assert list(found.ablations.index) == list(ABLATIONS) and list(found.ablations["found_under"]) == [True, *[False] * 3]
    zeroed, row = tlnp.evaluate(model, circuit_with(model, ablation=tlnp.Ablation("zero")), prompts), found.ablations.loc["zero"]
    assert (row["kl"], row["faithfulness"]) == pytest.approx((zeroed.kl, zeroed.faithfulness))
    assert all(p.grad is None for p in model.parameters()), "constants are learned without leaving gradients on the weights"
    start = tlnp.Ablation("optimal").fit(model, prompts, circuit.space.hooks)
    assert found.ablations.loc["optimal", "kl"] < 0.9 * tlnp.evaluate(model, circuit_with(model, ablation=start), prompts).kl


def test_p_value_of_random_circuits_and_tests(toy: Toy, found: tlnp.Report) -> None:
    model, prompts = toy
    null = found.null
    assert len(null.kl) == 49 and null.over_layers and null.possible == math.comb(12, 7) * 3
    assert null.p_value == pytest.approx((1 + int((null.kl <= found.evaluation.kl).sum())) / 50) and found.verdict("random circuits").passed
    rows = torch.arange(len(prompts))
    scores = prompts.logit_diff(circuit_logits(model, circuit_with(model), prompts))
    full = prompts.logit_diff(model(prompts.clean)[rows, prompts.answer_positions].detach())
    assert found.equivalence.statistic == pytest.approx(abs(float((scores > full).float().mean()) - 0.5))
    complement = prompts.logit_diff(circuit_logits(model, ~circuit_with(model), prompts))
    assert found.independence.statistic == pytest.approx(tlnp.hypotheses.independence(complement, full).statistic, rel=1e-2)
    assert found.task_p == pytest.approx(stats.wilcoxon(
        (full - prompts.logit_diff(full_logits(model, dataclasses.replace(prompts, clean=prompts.corrupted)))).double().numpy(),
        alternative="greater").pvalue)


def test_random_parts_knocked_out_by_hand(toy: Toy) -> None:
    """With one unit kept a subset is that unit or nothing, so both gaps are known."""
    model, prompts = toy
    circuit, head = circuit_with(model, [("head", 0, 2)]), Unit("head", 0, (2,))
    report = tlnp.report(model, circuit, prompts, **CHEAP | {"n_subsets": 12})
    full = tlnp.Circuit.full(circuit.space)

    def gap(units: list[Unit]) -> float:
        one, other = (tlnp.evaluate(model, closed(given, units), prompts).logit_diff for given in (full, circuit))
        return abs(one - other)

    either = torch.tensor([gap([]), gap([head])])
    gaps = report.completeness.gaps
    nearest = (gaps[:, None] - either[None]).abs().min(1)
    assert nearest.values.max() < 1e-3 and set(nearest.indices.tolist()) == {0, 1}
    span = report.evaluation.full.logit_diff - report.evaluation.ablated.logit_diff
    assert report.completeness.gap_share == pytest.approx(float(gaps.mean()) / span, rel=1e-4)


def test_forms(found: tlnp.Report) -> None:
    assert [verdict.name for verdict in found.verdicts] == VERDICTS and found.verdict("task").passed
    frame, text, markdown = found.to_frame(), str(found), found.to_markdown()
    assert frame.loc["kl", "value"] == found.evaluation.kl and frame.loc["random circuits", "p_value"] == found.null.p_value
    assert frame.loc["equivalence", "passed"] is found.equivalence.passed and isinstance(frame, pd.DataFrame)
    for part in ("8 of 15 leaf nodes (mlp, head; layers 0, 1, 2)", "interchange ablation", "all positions", "24 prompts",
                 "none given as held out", "8 of 8 kept units (block) tried", "49 random draws", "alpha 0.05, seed 0"):
        assert part in text and part in markdown, part
    assert len(text.splitlines()) == 1 + len(VERDICTS) + len(found.notes) and repr(found) == text
    assert all(verdict.sentence in markdown for verdict in found.verdicts)
    tables = [line for line in markdown.splitlines() if line.startswith("| measure")]
    assert tables == ["| measure | value | low | high | p_value |"]
    with pytest.raises(KeyError, match="there is no verdict 'nulls'; there are task"):
        found.verdict("nulls")
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.task_p = 0.0  # type: ignore[misc]


def test_a_models_name_is_no_markup(found: tlnp.Report) -> None:
    named = dataclasses.replace(found, settings=dataclasses.replace(found.settings, model="<img src=x onerror=run()>\n# _a_ [b](c) `d`"),
                                notes=("found on 'a<script>b|c'",))
    markdown = named.to_markdown()
    assert r"in &lt;img src=x onerror=run()&gt; # \_a\_ \[b\](c) \`d\`; interchange" in markdown and "<" not in markdown.split("##")[0]
    assert r"- found on 'a&lt;script&gt;b\|c'" in markdown and "<img src=x onerror=run()>" in str(named)


def test_same_seed_same_report_and_batch_size_is_memory_only(toy: Toy) -> None:
    circuit, prompts = circuit_with(toy[0]), toy[1][:12]
    one, again, small = (tlnp.report(toy[0], circuit, prompts, **CHEAP | {"batch_size": size}) for size in (256, 256, 7))
    assert again.to_frame().equals(one.to_frame()) and again.verdicts == one.verdicts and again.effects.equals(one.effects)
    assert (small.to_frame().drop(columns="passed") - one.to_frame().drop(columns="passed")).abs().max().max() < 1e-3


def test_the_full_circuit(toy: Toy) -> None:
    model, prompts = toy
    full = tlnp.Circuit.full(find_nodes(model).restrict(("head", "mlp")))
    report = tlnp.report(model, full, prompts, **CHEAP)
    assert report.equivalence.passed and report.equivalence.statistic == 0, "ties, not chance"
    assert report.completeness.left == 0 and report.completeness.gap_share == pytest.approx(0, abs=1e-4)
    assert report.completeness.complement.kl == pytest.approx(report.evaluation.ablated.kl, abs=1e-4)
    assert report.verdict("minimality").passed is None and "every unit is kept whole" in report.minimality.sentence
    assert report.verdict("random circuits").passed is None and "no other circuit" in report.verdict("random circuits").sentence


def test_the_empty_circuit(toy: Toy) -> None:
    report = tlnp.report(toy[0], tlnp.Circuit.empty(circuit_with(toy[0]).space), toy[1], **CHEAP)
    assert report.evaluation.faithfulness == 0 and report.completeness.left == pytest.approx(1, abs=1e-4)
    assert not report.equivalence.passed and "the circuit keeps none" in report.minimality.sentence
    assert report.verdict("completeness").passed is None and report.verdict("redundancy").passed is None and not len(report.effects)


def test_a_random_circuit_gets_no_good_word(toy: Toy) -> None:
    model, prompts = toy
    bad = circuit_with(model, [*(("head", 2, i) for i in range(4)), ("head", 0, 3), ("mlp", 2), ("mlp", 1)])
    report = tlnp.report(model, bad, prompts, **QUICK)
    assert report.evaluation.kl > 5
    for name in ("completeness", "random circuits", "equivalence", "minimality"):
        assert report.verdict(name).passed is False, name


def test_no_task_no_claim(toy: Toy) -> None:
    """Answers exchanged in half of the pairs: the model's preference no longer goes with them."""
    model, prompts = toy
    swap = torch.arange(len(prompts)) % 2 == 0
    exchanged = dataclasses.replace(prompts, answers=torch.where(swap, prompts.wrong_answers, prompts.answers),
                                    wrong_answers=torch.where(swap, prompts.answers, prompts.wrong_answers))
    report = tlnp.report(model, circuit_with(model), exchanged, **CHEAP)
    assert report.task_p > 0.05 and report.verdict("task").passed is False
    assert all(verdict.passed is None and verdict.sentence.startswith("(no task here") for verdict in report.verdicts[1:])
    assert not (report.to_frame()["passed"] == True).any()  # noqa: E712 (a column of objects)


def test_repeated_prompts_count_once(toy: Toy) -> None:
    """One prompt 24 times is one prompt: nothing can be tested on it."""
    model, prompts = toy
    once, often = (tlnp.report(model, circuit_with(model), some, **CHEAP) for some in (prompts[:8], prompts[list(range(8)) * 3]))
    assert often.settings.n_prompts == 8 and often.evaluation == once.evaluation and often.task_p == once.task_p
    assert [str(a) for a in often.verdicts] == [str(b) for b in once.verdicts]
    assert "16 pairs are left out, since the clean prompt of each is there in another pair already." in often.notes
    single = tlnp.report(model, circuit_with(model), prompts[[0] * 24], **CHEAP)
    assert single.verdict("task").passed is None and "needs 7 prompts or more; got 1" in single.verdict("task").sentence


def test_corrupted_prompts_that_are_missing_in_part_are_counted(toy: Toy) -> None:
    model, prompts = toy
    some = dataclasses.replace(prompts, corrupted=torch.where(torch.arange(24)[:, None] < 5, prompts.clean, prompts.corrupted))
    note = "5 of the 24 corrupted prompts are the same as the clean ones, so that nothing is ablated there."
    assert note in tlnp.report(model, circuit_with(model), some, **CHEAP).notes
    assert not any("same as the clean" in one for one in tlnp.report(model, circuit_with(model), prompts, **CHEAP).notes)
    again = [i for i in range(8) for _ in range(2)]  # the first of each two lacks its corrupted prompt
    clean, corrupted = prompts.clean[again], prompts.corrupted[again]
    half = tlnp.PromptPairs(clean, torch.where(torch.arange(16)[:, None] % 2 == 0, clean, corrupted), prompts.answers[again],
                            prompts.wrong_answers[again], prompts.attention_mask[again])
    with pytest.raises(ValueError, match="corrupted prompts are missing"):
        tlnp.report(model, circuit_with(model), half, **CHEAP)


def test_the_circuit_is_knocked_out_where_layers_stand_above_what_is_not_gated(toy: Toy) -> None:
    """Attention is gated with its layer only: without the circuit, a layer that it keeps has none, one that it cuts has its own."""
    model, prompts = toy
    space = find_nodes(model).restrict(("layer", "mlp"))
    circuit = tlnp.Circuit(space, {key: torch.tensor(key.layer < 2) for key in space.shapes})
    without = tlnp.Circuit(space, {key: torch.tensor(key.layer == 2) for key in space.shapes})
    report = tlnp.report(model, circuit, prompts, **CHEAP)
    assert report.completeness.complement.kl == pytest.approx(tlnp.evaluate(model, without, prompts).kl, rel=1e-3)


def test_few_prompts_say_how_many_it_takes(toy: Toy) -> None:
    report = tlnp.report(toy[0], circuit_with(toy[0]), toy[1][:5], **QUICK | {"n_random": 10})
    assert report.verdict("task").passed is None and "needs 7 prompts or more; got 5" in report.verdict("task").sentence
    for test in (report.equivalence, report.independence):
        assert math.isnan(test.p_value) and test.passed is None and "needs 20 prompts or more; got 5" in test.sentence
    assert "needs 49 random units or more; got 10" in report.minimality.sentence
    assert "they need 10 prompts or more" in report.verdict("faithfulness").sentence
    assert all(math.isnan(low) and math.isnan(high) for low, high in report.intervals.values())
    assert report.verdict("random circuits").passed is None and "only 10 were drawn" in report.verdict("random circuits").sentence
    tlnp.report(toy[0], circuit_with(toy[0]), toy[1][:1], **CHEAP).to_markdown()


def test_held_out_prompts_judge(toy: Toy) -> None:
    model, prompts = toy
    circuit = circuit_with(model)
    report = tlnp.report(model, circuit, prompts[:12], held_out=prompts[10:], **CHEAP)
    assert report.evaluation == tlnp.evaluate(model, circuit, prompts[10:]) and report.settings.n_prompts == 14
    assert report.searched == tlnp.evaluate(model, circuit, prompts[:12]) and "## On the prompts of the search" in report.to_markdown()
    assert "14 prompts, held out from the search" in str(report) and "2 of the 14 held-out prompts are among those" in str(report)


def test_many_units_are_drawn_from(toy: Toy) -> None:
    report = tlnp.report(toy[0], circuit_with(toy[0]), toy[1][:4], **QUICK | {"max_units": 3, "n_subsets": 1})
    assert len(report.effects) == 3 and "3 of 8 kept units (block) tried" in str(report)
    assert "3 units tried" in report.minimality.sentence


def test_other_ablations_and_missing_corrupted_prompts(toy: Toy) -> None:
    model, prompts = toy
    alone = dataclasses.replace(prompts, corrupted=prompts.clean)
    with pytest.raises(ValueError, match="corrupted prompts are missing: all are the same as the clean ones"):
        tlnp.report(model, circuit_with(model), alone, **CHEAP)
    with pytest.raises(ValueError, match="corrupted prompts are missing"):
        tlnp.report(model, circuit_with(model), prompts, held_out=alone, **CHEAP)
    space = circuit_with(model).space
    learned = tlnp.Ablation("optimal").fit(model, prompts, space.hooks)
    report = tlnp.report(model, circuit_with(model, ablation=learned), alone, **CHEAP)
    assert list(report.ablations.index) == ["mean", "zero", "optimal"] and list(report.ablations["found_under"]) == [False, False, True]
    assert any("Interchange ablation is left out" in note for note in report.notes)
    assert math.isnan(report.task_p) and report.verdict("task").passed is None
    assert "on 100% of 24 prompts" in report.verdict("task").sentence
    assert report.verdict("completeness").passed is not None, "no task test is not the same as no task"
    with pytest.raises(ValueError, match="ablation 'mean' has no constant"):
        tlnp.report(model, circuit_with(model, ablation=tlnp.Ablation("mean")), prompts, **CHEAP)


def test_one_prompt_decides_nothing(toy: Toy) -> None:
    report = tlnp.report(toy[0], circuit_with(toy[0]), toy[1][:1], **CHEAP)
    assert all(verdict.passed is None for verdict in report.verdicts)
    assert report.verdict("random circuits").sentence.startswith("(fewer than 7 prompts, so no claim) ")


def test_means_are_those_of_the_search_s_prompts(toy: Toy) -> None:
    model, prompts = toy
    train, test = prompts.split(0.5, seed=0)
    circuit = circuit_with(model)
    mean = tlnp.Ablation("mean").fit(model, train, circuit.space.hooks)
    under = tlnp.Circuit(circuit.space, {key: circuit.live(*key) for key in circuit.space.shapes}, mean)
    report = tlnp.report(model, circuit, train, held_out=test, **CHEAP)
    assert report.ablations.loc["mean", "kl"] == pytest.approx(tlnp.evaluate(model, under, test).kl)
    lengths = prompts.attention_mask.sum(1)
    short = prompts[(lengths == lengths.min()).nonzero()[:, 0]]
    longer = tlnp.report(model, circuit, short, held_out=prompts, **CHEAP)
    assert "mean" not in longer.ablations.index and any("Mean ablation is left out" in note for note in longer.notes)


def test_a_constant_metric_is_named(toy: Toy) -> None:
    model, prompts = toy
    last = find_nodes(model).restrict(("mlp",), [2])
    hardly = dataclasses.replace(prompts, corrupted=prompts.clean.clone())
    hardly.corrupted[0, -1] = 5  # after the answer position of the first, shorter prompt: nothing that is read changes
    assert hardly.answer_positions[0] < hardly.clean.shape[1] - 1
    with pytest.raises(ValueError, match=r"the metric is constant: with every node of this circuit ablated \(interchange\)"):
        tlnp.report(model, tlnp.Circuit.empty(last), hardly, **CHEAP)


@pytest.mark.parametrize(("change", "error", "text"), [
    ({"n_random": 0}, ValueError, "n_random=0; it must be a whole number, 1 or more"),
    ({"n_subsets": 2.5}, TypeError, "n_subsets=2.5"),
    ({"batch_size": -1}, ValueError, "batch_size=-1"),
    ({"max_units": True}, TypeError, "max_units=True"),
    ({"alpha": 1.0}, ValueError, "alpha=1.0; it must lie between 0 and 1"),
    ({"units": "heads"}, ValueError, "units='heads'; allowed: 'block', 'node'"),
    ({"held_out": "test"}, TypeError, "held_out must be PromptPairs, got str"),
])
def test_bad_arguments(toy: Toy, change: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        tlnp.report(toy[0], circuit_with(toy[0]), toy[1], **CHEAP | change)


def test_other_models_and_states(toy: Toy, other_model: Any) -> None:
    model, prompts = toy
    with pytest.raises(ValueError, match=r"this circuit was found on another model .* needs blocks.0.attn.hook_z with head nodes \[4\]"):
        tlnp.report(other_model, circuit_with(model), prompts, **CHEAP)
    with pytest.raises(TypeError, match="circuit must be a Circuit, got dict"):
        tlnp.report(model, circuit_with(model).masks, prompts, **CHEAP)  # type: ignore[arg-type]
    circuit = circuit_with(model)
    with circuit.applied(model, prompts), pytest.raises(RuntimeError, match="a circuit is applied"):
        tlnp.report(model, circuit, prompts, **CHEAP)


def test_masks_are_left_out(toy: Toy) -> None:
    model, prompts = toy[0], toy[1][:4]
    circuit = circuit_with(model)
    plain = tlnp.report(model, circuit, prompts, **CHEAP)
    masks = model.add_node_masks(("head", "mlp"))
    try:
        masks.set_to(tlnp.Circuit.empty(masks.space))
        masked = tlnp.report(model, circuit, prompts, **CHEAP)
    finally:
        model.remove_node_masks()
    assert masked.to_frame().equals(plain.to_frame())
