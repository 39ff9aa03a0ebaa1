"""The public names, frozen: a name in a line of its own, and the attributes of a class after it. To take one away breaks a user's code."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re

import pytest

import tl_nodeprune as tlnp

NAMES = """
GRANULARITIES
Ablation: constants cpu fit fitted name values
Circuit: applied check_fits count empty folded from_masks from_nodes full fwd_hooks hooks_on iou live load masks nodes parameters
    parameters_total save size size_total sparsity summary under
Estimate: finish frontier peak saved_for_backward search_state seconds set_up stand_ins to_frame training weights
Evaluation: ablated ablation accuracy circuit exact_match faithfulness full kl logit_diff n_prompts to_frame
HardConcrete: beta closed_score gamma kept open_score probability sample straight_through value zeta
NodeMasks: as_dict attach attached expected_size gate_values inactive mask model on paired prune remove sampling score set_to
    standing_in to_circuit
NodeScores: ablation count flat from_circuit from_effects from_flat gates n space top
PaperObjective: batch_size hinge lam lr lr_end max_grad_norm sparsity steps summed train warmup weight_decay weights
PromptPairs: answer_positions answers attention_mask batches check_corrupted check_fits clean correct corrupted distinct from_jsonl
    from_strings has_corrupted logit_diff n_same reach split to without_repeats wrong_answers
PruneResult: accuracy at circuit converged frontier held_out history interval kl loss minimal p_value peak_memory ranking ruled_out
    scores search_kl searched seconds stopped tested to_frame
Report: ablations circuit completeness effects equivalence evaluation independence intervals minimality notes null pairs_among
    redundancies searched settings stand_ins_sought task_p to_frame to_markdown verdict verdicts
StepGate: closed_score kept open_score probability sample value width
Sweep: consensus frequency frontier iou runs to_frame
add_node_masks
crosscheck
estimate
evaluate
hypotheses
kl_divergence
mib
prune
rank
remove_node_masks
report
sweep
tasks
toy
viz
crosscheck.COARSE
crosscheck.Agreement: of rows scores share to_frame
crosscheck.Effects: clean corrupted direction gates granularities method n_prompts normalised of space to_frame
crosscheck.GranularityAgreement: auroc cut_with_effect granularity kept_without_effect n_kept n_nodes precision_at_k rank_correlation
    reason
crosscheck.NodeScore: granularity index layer name score
crosscheck.activation_patching
crosscheck.agreement
crosscheck.attribution_patching
tasks.gendered_pronoun
tasks.greater_than
tasks.ioi
tasks.make
mib.SIZES
mib.FaithfulnessCurve: ablated ablation cmd cpr f full n_prompts nodes sizes to_frame
mib.area
mib.distance
mib.evaluate
mib.read
mib.shortfall
mib.write
viz.agreement
viz.circuit_graph
viz.compare
viz.frontier
viz.history
viz.kept_heads
viz.kept_neurons
viz.mask_map
viz.neuron_map
viz.node_table
viz.overview
viz.pruned_neurons
viz.save_html
viz.token_effects
toy.load
hypotheses.FEWEST
hypotheses.HypothesisTest: name not_made p_value passed sentence statistic
hypotheses.equivalence
hypotheses.independence
hypotheses.minimality
search.Estimate: finish frontier peak saved_for_backward search_state seconds set_up stand_ins to_frame training weights
search.PaperObjective: batch_size hinge lam lr lr_end max_grad_norm sparsity steps summed train warmup weight_decay weights
search.PruneResult: accuracy at circuit converged frontier held_out history interval kl loss minimal p_value peak_memory ranking
    ruled_out scores search_kl searched seconds stopped tested to_frame
search.Step: coefficient kl size step
search.Sweep: consensus frequency frontier iou runs to_frame
search.SweepRun: held_out max_kl result seed
search.estimate
search.prune
search.rank
search.sweep
evidence.Metrics: accuracy exact_match kl logit_diff
evidence.Settings: ablation alpha granularities held_out layers model n_prompts n_random n_subsets seed size size_total units units_kept
    units_tried
evidence.Verdict: name passed sentence
evidence.Completeness: complement gap_share gaps left
evidence.RandomDraws: kl median over_layers p_value possible
evidence.Redundancy: kept others recovered rise unit
masks.Gate: closed_score kept open_score probability sample value
nodes.NodeSpace: ancestors at check_fits children covered d_model finest free free_total gated_mlp granularities hooks kv_heads lacking
    layers matrices model_name n_layers other_name present restrict shapes totals weights width
nodes.GateKey: granularity hook layer
"""
ROWS = [row.split() for row in re.sub(r"\n +", " ", NAMES).strip().splitlines()]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].rstrip(":"))
def test_a_public_name_is_there_with_its_attributes(row: list[str]) -> None:
    path, attributes = row[0].rstrip(":"), row[1:]
    package, _, name = path.rpartition(".")
    module = getattr(tlnp, package) if package in tlnp.__all__ else importlib.import_module(f"tl_nodeprune.{package}".rstrip("."))
    found = getattr(module, name)
    there = {*dir(found), *getattr(found, "__annotations__", {})}
    if dataclasses.is_dataclass(found):
        there |= {field.name for field in dataclasses.fields(found)}
    assert set(attributes) <= there



def test_methods_put_on_by_the_package_show_their_signature_and_docstring() -> None:
    for name in ("prune", "to_circuit", "set_to"):
        method = getattr(tlnp.NodeMasks, name)
        assert next(iter(inspect.signature(method).parameters)) in ("self", "masks") and len(inspect.getdoc(method) or "") > 40
