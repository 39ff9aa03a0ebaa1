"""Activation and attribution patching against TransformerLens' own, by hand, and against each other."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import patching

import tl_nodeprune as tlnp
from tl_nodeprune.evidence.crosscheck import activation_patching, attribution_patching
from tl_nodeprune.nodes.probe import find_nodes
from tl_nodeprune.nodes.space import GateKey

Toy = tuple[Any, tlnp.PromptPairs]


def metric_of(prompts: tlnp.PromptPairs) -> Any:
    rows = torch.arange(len(prompts))
    return lambda logits: prompts.logit_diff(logits[rows, prompts.answer_positions].float()).mean()


def test_head_effects_are_transformer_lens_own(each_toy: Toy) -> None:
    model, prompts = each_toy
    metric = metric_of(prompts)
    with torch.no_grad():
        _, cache = model.run_with_cache(prompts.clean)
        base = metric(model(prompts.corrupted))
        theirs = patching.get_act_patch_attn_head_out_all_pos(model, prompts.corrupted, cache, metric) - base
    ours = tlnp.crosscheck.activation_patching(model, prompts, ["head"], progress=False)
    assert list(ours) == [f"blocks.{layer}.attn.hook_z" for layer in range(3)]
    for layer in range(3):
        effect = ours[f"blocks.{layer}.attn.hook_z"]
        assert effect.shape == (4, 24) and torch.equal(effect, effect[:, :1].expand(4, 24))
        torch.testing.assert_close(effect[:, 0], theirs[layer].to(effect), atol=1e-5, rtol=1e-5)
    assert theirs.abs().max() > 0.5  # there is something to agree on


def test_default_has_the_keys_and_shapes_of_a_circuit(toy: Toy) -> None:
    model, prompts = toy
    effects = tlnp.crosscheck.activation_patching(model, prompts[:4], progress=False)
    circuit = tlnp.Circuit.full(tlnp.nodes.probe.find_nodes(model).restrict(tlnp.crosscheck.COARSE))
    assert {hook: effect.shape for hook, effect in effects.items()} == {hook: mask.shape for hook, mask in circuit.items()}


@pytest.mark.parametrize("hook", ["hook_attn_out", "hook_mlp_out"])
def test_block_effects_by_hand(toy: Toy, hook: str) -> None:
    model, prompts = toy
    metric, name = metric_of(prompts), f"blocks.1.{hook}"
    with torch.no_grad():
        _, cache = model.run_with_cache(prompts.clean)

        def patch(activation: Tensor, hook: Any) -> Tensor:
            return cache[name]  # type: ignore[no-any-return]

        by_hand = metric(model.run_with_hooks(prompts.corrupted, fwd_hooks=[(name, patch)])) - metric(model(prompts.corrupted))
    effect = tlnp.crosscheck.activation_patching(model, prompts, ["attn" if "attn" in hook else "mlp"], progress=False)[name]
    torch.testing.assert_close(effect, by_hand.expand(effect.shape), atol=1e-5, rtol=1e-5)


def test_whole_layers(toy: Toy) -> None:
    effects = tlnp.crosscheck.activation_patching(toy[0], toy[1][:4], ["layer"], progress=False)
    assert [effect.shape for effect in effects.values()] == [()] * 3


def test_masks_are_left_out_and_errors(toy: Toy) -> None:
    model, prompts = toy
    plain = tlnp.crosscheck.activation_patching(model, prompts[:4], ["head"], progress=False)
    masks = model.add_node_masks()
    try:
        masks.set_to(tlnp.Circuit.empty(masks.space))
        masked = tlnp.crosscheck.activation_patching(model, prompts[:4], ["head"], progress=False)
    finally:
        model.remove_node_masks()
    assert all(torch.equal(plain[hook], masked[hook]) for hook in plain)
    with pytest.raises(ValueError, match="unknown granularity 'heads'"):
        tlnp.crosscheck.activation_patching(model, prompts, ["heads"])
    with tlnp.Circuit.empty(masks.space).applied(model, prompts), pytest.raises(RuntimeError, match="a circuit is applied"):
        tlnp.crosscheck.activation_patching(model, prompts)


def by_hand(toy: Toy, key: GateKey, index: tuple[int, ...], direction: str) -> Tensor:
    """The effect of one node by run_with_hooks."""
    (model, prompts), metric = toy, metric_of(toy[1])
    base, other = (prompts.corrupted, prompts.clean) if direction == "denoise" else (prompts.clean, prompts.corrupted)
    with torch.no_grad():
        _, cache = model.run_with_cache(other)
        _, own = model.run_with_cache(base)

        def patch(activation: Tensor, hook: Any) -> Tensor:
            patched = activation.clone()
            if key.granularity == "layer":
                pre = key.hook.replace("post", "pre")
                return own[pre] + cache[key.hook] - cache[pre]  # type: ignore[no-any-return]
            patched[(slice(None), slice(None), *index)] = cache[key.hook][(slice(None), slice(None), *index)]
            return patched

        return metric(model.run_with_hooks(base, fwd_hooks=[(key.hook, patch)])) - metric(model(base))  # type: ignore[no-any-return]


NODES = [("layer", ()), ("attn", ()), ("mlp", ()), ("head", (2,)), ("attn_neuron", (1, 5)), ("mlp_neuron", (17,)), ("mlp_out", (40,))]


@pytest.fixture(scope="module", params=["denoise", "noise"])
def every(request: pytest.FixtureRequest) -> tuple[str, Toy, tlnp.crosscheck.Effects]:
    """The exact effects of all nodes of the embedded model, on a few prompts."""
    model, prompts = tlnp.toy.load(n=2)
    return request.param, (model, prompts), activation_patching(model, prompts, None, direction=request.param, progress=False)


@pytest.mark.parametrize(("name", "index"), NODES)
def test_every_granularity_is_the_effect_by_hand(every: tuple[str, Toy, Any], name: str, index: tuple[int, ...]) -> None:
    direction, toy, effects = every
    for layer, of_layer in effects.of(name).items():
        torch.testing.assert_close(of_layer[index], by_hand(toy, GateKey(name, layer), index, direction), atol=1e-5, rtol=1e-5)
    assert max(float(of_layer.abs().max()) for of_layer in effects.of(name).values()) > 0.02


def test_all_granularities_stand_side_by_side(every: tuple[str, Toy, Any]) -> None:
    """Hook points that two granularities share hold the finest; `of` has both."""
    _, (model, _), effects = every
    space = find_nodes(model)
    assert list(effects) == list(space.hooks) and effects.granularities == tlnp.GRANULARITIES
    assert {hook: effect.shape for hook, effect in effects.items()} == {hook: space.width(hook) for hook in space.hooks}
    assert torch.equal(effects["blocks.1.attn.hook_z"], effects.of("attn_neuron")[1])
    assert torch.equal(effects["blocks.2.hook_mlp_out"], effects.of("mlp_out")[2])
    assert effects.of("head")[1].shape == (4,) and effects.of("mlp")[2].shape == ()
    frame = effects.to_frame()
    assert len(frame) == sum(space.totals().values()) and frame["effect"].abs().is_monotonic_decreasing
    top = frame.iloc[0]
    assert float(effects.of(top["granularity"])[top["layer"]][top["index"]]) == pytest.approx(top["effect"])


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_block_effects_are_transformer_lens_generic_patching_at_all_positions(each_toy: Toy, direction: str) -> None:
    model, prompts = each_toy
    base, other = (prompts.corrupted, prompts.clean) if direction == "denoise" else (prompts.clean, prompts.corrupted)
    effects = activation_patching(model, prompts, ["attn", "mlp"], direction=direction, progress=False)
    with torch.no_grad():
        _, cache = model.run_with_cache(other)
        for name in ("attn", "mlp"):
            theirs = patching.generic_activation_patch(
                model, base, cache, metric_of(prompts), lambda corrupted, index, clean: clean, f"{name}_out", index_axis_names=["layer"])
            ours = torch.stack(list(effects.of(name).values()))
            torch.testing.assert_close(ours, theirs - metric_of(prompts)(model(base)), atol=1e-5, rtol=1e-5)
            assert ours.abs().max() > 0.5


def test_block_effects_are_get_act_patch_mlp_out_where_prompts_differ_at_one_position(each_toy: Toy) -> None:
    """TransformerLens patches one position at a time: the same thing where clean and corrupted differ at the last position only."""
    model, given = each_toy
    given = given[given.answer_positions == given.answer_positions[0]]
    at = int(given.answer_positions[0])
    corrupted = given.clean.clone()
    corrupted[:, at] = given.clean[:, at - 1]
    pairs = tlnp.PromptPairs(given.clean, corrupted, given.answers, given.wrong_answers, given.attention_mask, given.answer_positions)
    effects = activation_patching(model, pairs, ["attn", "mlp"], progress=False)
    with torch.no_grad():
        base, (_, cache) = metric_of(pairs)(model(corrupted)), model.run_with_cache(pairs.clean)
        for name, patch in (("mlp", patching.get_act_patch_mlp_out), ("attn", patching.get_act_patch_attn_out)):
            ours = torch.stack(list(effects.of(name).values()))
            torch.testing.assert_close(ours, patch(model, corrupted, cache, metric_of(pairs))[:, at] - base, atol=1e-5, rtol=1e-5)
            assert ours.abs().max() > 0.1


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_heads_are_transformer_lens_own_with_and_without_a_bar(toy: Toy, direction: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, prompts = toy
    base, other = (prompts.corrupted, prompts.clean) if direction == "denoise" else (prompts.clean, prompts.corrupted)
    with torch.no_grad():
        _, cache = model.run_with_cache(other)
        theirs = patching.get_act_patch_attn_head_out_all_pos(model, base, cache, metric_of(prompts)) - metric_of(prompts)(model(base))
    capsys.readouterr()
    silent = activation_patching(model, prompts, ["head"], direction=direction, progress=False)
    assert capsys.readouterr().err == ""
    shown = activation_patching(model, prompts, ["head"], direction=direction)
    assert "12/12" in capsys.readouterr().err
    for effects in (silent, shown):
        torch.testing.assert_close(torch.stack(list(effects.of("head").values())), theirs, atol=1e-5, rtol=1e-5)


def test_a_model_in_training_mode_without_dropout_is_patched_by_our_own_forwards(fresh_toy: Toy) -> None:
    """TransformerLens' patching refuses it; nothing is random there, so the effects are the same."""
    model, prompts = fresh_toy[0], fresh_toy[1][:4]
    want = activation_patching(model, prompts, ["head"], progress=False)
    got = activation_patching(model.train(), prompts, ["head"], progress=True)
    assert all(torch.allclose(got[hook], want[hook], atol=1e-5) for hook in want)


def test_the_progress_bar_counts_every_node_and_prompt(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    activation_patching(toy[0], toy[1][:5], ["attn", "mlp"], batch_size=3)
    assert "patch: 100%" in (shown := capsys.readouterr().err) and "30/30" in shown


@pytest.mark.parametrize("method", [partial(activation_patching, progress=False), attribution_patching])
@pytest.mark.parametrize("batch_size", [1, 5, 7, 1000])
def test_batches_do_not_matter(toy: Toy, method: Any, batch_size: int) -> None:
    model, prompts = toy[0], toy[1][:5]
    want = method(model, prompts, ["head", "mlp", "layer"], batch_size=30)
    got = method(model, prompts, ["head", "mlp", "layer"], batch_size=batch_size)
    for hook in want:
        torch.testing.assert_close(got[hook], want[hook], atol=1e-5, rtol=1e-5)


def test_a_metric_of_ones_own(toy: Toy) -> None:
    """KL to the clean run: 0 there, so a node that helps lowers it; normalised, it brings back the same share or nearly so."""
    model, prompts = toy
    effects = activation_patching(model, prompts, metric=tlnp.kl_divergence, progress=False)
    assert effects.clean == pytest.approx(0, abs=1e-5) and effects.corrupted > 1
    logit = activation_patching(model, prompts, progress=False)
    share, by_kl = logit.normalised().of("head")[1][1], effects.normalised().of("head")[1][1]
    assert effects.of("head")[1][1] < -0.5 and share > 0.3 and by_kl > 0.3
    assert float(share) == pytest.approx(float(logit.of("head")[1][1]) / (logit.clean - logit.corrupted))
    assert (logit.normalised().clean, logit.normalised().corrupted) == (1, 0) and logit.normalised().normalised() == logit.normalised()


def test_noise_is_denoise_with_the_prompts_swapped(toy: Toy) -> None:
    model, p = toy[0], toy[1][:6]
    swapped = tlnp.PromptPairs(p.corrupted, p.clean, p.answers, p.wrong_answers, p.attention_mask, p.answer_positions)
    for method in (partial(activation_patching, progress=False), attribution_patching):
        ours, theirs = method(model, p, ["head"], direction="noise"), method(model, swapped, ["head"])
        assert all(torch.allclose(ours[hook], theirs[hook], atol=1e-6) for hook in ours)
        assert (ours.clean, ours.corrupted) == pytest.approx((theirs.corrupted, theirs.clean)) and ours != theirs


def test_attribution_goes_with_the_exact_effects(every: tuple[str, Toy, Any]) -> None:
    from scipy import stats

    direction, (model, prompts), exact = every
    fast = attribution_patching(model, prompts, direction=direction)
    for name in ("attn_neuron", "mlp_neuron", "mlp_out"):
        pair = [torch.stack(list(effects.of(name).values())).flatten() for effects in (exact, fast)]
        assert stats.spearmanr(*pair).statistic > 0.75


@pytest.mark.parametrize("method", [partial(activation_patching, progress=False), attribution_patching])
def test_bad_input_is_named(toy: Toy, method: Any) -> None:
    model, prompts = toy[0], toy[1][:4]
    same = tlnp.PromptPairs(prompts.clean, prompts.clean, prompts.answers, prompts.wrong_answers)
    for bad, text in (({"direction": "up"}, "unknown direction 'up'; allowed: 'denoise'"), ({"batch_size": 0}, "batch_size=0; it must be"),
                      ({"granularities": []}, "granularities is empty"), ({"granularities": ["edge"]}, "unknown granularity 'edge'"),
                      ({"metric": lambda logits, full, prompts: logits.sum() * 0}, r"must return a tensor \[batch\].*4 prompts; got \(\)"),
                      ({"metric": lambda logits, full, prompts: 0 * logits[:, 0] + 3}, "the metric is the same .* 3 on average"),
                      ({"prompts": same}, "copies of the clean")):
        with pytest.raises(ValueError, match=text):
            method(model, **{"prompts": prompts, **bad})
    with pytest.raises(TypeError, match="prompts must be PromptPairs, got Tensor"):
        method(model, prompts.clean)
    with pytest.raises(FloatingPointError, match="NaN or inf in the metric"):
        method(model, prompts, metric=lambda logits, full, prompts: logits[:, 0] * float("nan"))
    with pytest.raises(ValueError, match="vocabulary ends at 198"):
        method(model, tlnp.PromptPairs(prompts.clean + 500, prompts.corrupted, prompts.answers, prompts.wrong_answers))


def test_a_metric_without_gradient(toy: Toy) -> None:
    def right(logits: Tensor, full: Tensor, prompts: tlnp.PromptPairs) -> Tensor:
        return (prompts.logit_diff(logits) > 0).float()

    model, prompts = toy
    assert activation_patching(model, prompts, ["head"], metric=right, progress=False).of("head")[1].max() > 0
    with pytest.raises(ValueError, match="the metric has no gradient"):
        attribution_patching(model, prompts, metric=right)


def test_a_metric_that_fails_half_way_leaves_no_hooks(toy: Toy) -> None:
    calls: list[int] = []

    def failing(logits: Tensor, full: Tensor, prompts: tlnp.PromptPairs) -> Tensor:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("metric failed")
        return prompts.logit_diff(logits)

    for progress in (True, False):
        calls.clear()
        with pytest.raises(RuntimeError, match="metric failed"):
            activation_patching(toy[0], toy[1][:4], ["head", "mlp_neuron"], metric=failing, progress=progress)


def test_hooks_of_ones_own_stay_and_act(fresh_toy: Toy, no_hooks_left: Any) -> None:
    model, prompts = fresh_toy[0], fresh_toy[1][:4]
    plain = activation_patching(model, prompts, ["head"])
    model.add_hook("blocks.1.hook_mlp_out", lambda activation, hook: activation * 0)
    for method in (activation_patching, partial(activation_patching, progress=False), attribution_patching):
        without = method(model, prompts, ["head"])
        assert without.clean != plain.clean
    assert sum(len(point.fwd_hooks) for point in {id(p): p for p in model.hook_dict.values()}.values()) == 1
    model.reset_hooks()
    no_hooks_left(model)


@pytest.mark.parametrize("progress", [True, False])
def test_effects_of_single_prompts(toy: Toy, progress: bool) -> None:
    """Those of a prompt alone are its own column, however prompts are batched; their mean is the effect."""
    model, prompts = toy
    effects = activation_patching(model, prompts[:5], progress=progress, batch_size=3)
    alone = [activation_patching(model, prompts[i : i + 1], progress=False) for i in range(5)]
    for key, gate in effects.gates.items():
        assert effects.by_prompt[key].shape == (*gate.shape, 5)
        torch.testing.assert_close(effects.by_prompt[key].mean(-1), gate)
        torch.testing.assert_close(effects.by_prompt[key], torch.stack([one.gates[key] for one in alone], -1), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not hasattr(patching, "PatchingResult"), reason="TransformerLens 3 has no PatchingResult")
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_a_patching_result_is_transformer_lens_own(toy: Toy, direction: str) -> None:
    model, prompts = toy[0], toy[1][:6]
    rows = torch.arange(6)

    def metric(logits: Tensor) -> Tensor:
        return prompts.logit_diff(logits[rows, prompts.answer_positions].float())

    run, source = (prompts.corrupted, prompts.clean) if direction == "denoise" else (prompts.clean, prompts.corrupted)
    with torch.no_grad():
        _, cache = model.run_with_cache(source)
        theirs = patching.get_act_patch_attn_head_out_all_pos(model, run, cache, metric, reduce="none", baseline=True)
    ours = activation_patching(model, prompts, direction=direction, progress=False)
    mine = ours.to_patching_result()
    assert type(mine) is type(theirs) and mine.axis_names == theirs.axis_names and mine.metric_names == theirs.metric_names
    assert mine.index_df.to_dict() == theirs.index_df.to_dict() and not mine.reduced
    torch.testing.assert_close(mine.values, theirs.values.cpu(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mine.baseline, theirs.baseline.cpu(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mine.effect().mean(-1), torch.stack(list(ours.of("head").values())), atol=1e-4, rtol=1e-4)
    low, high = mine.bootstrap_ci(of_effect=True)
    assert (low <= mine.effect().mean(-1) + 1e-5).all() and (high >= mine.effect().mean(-1) - 1e-5).all()
    assert mine.permutation_pvalue().shape == (3, 4) and len(mine.to_dataframe()) == 72
    shares = ours.normalised().to_patching_result()
    torch.testing.assert_close(shares.effect().mean(-1), torch.stack(list(ours.normalised().of("head").values())), atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not hasattr(patching, "PatchingResult"), reason="TransformerLens 3 has no PatchingResult")
def test_patching_results_of_other_nodes_and_of_attribution(toy: Toy) -> None:
    model, prompts = toy[0], toy[1][:4]
    exact = activation_patching(model, prompts, ["mlp"], progress=False).to_patching_result("mlp")
    assert exact.values.shape == (3, 4) and exact.axis_names == ["layer"]
    effects = attribution_patching(model, prompts, ["attn_neuron", "mlp"])
    first = effects.to_patching_result("attn_neuron")
    assert first.reduced and first.values.shape == (3, 4, 24) and list(first.index_df) == ["layer", "head", "d_head"]
    torch.testing.assert_close(first.effect(), torch.stack(list(effects.of("attn_neuron").values())), atol=1e-5, rtol=1e-4)
    assert len(first.to_dataframe()) == 288
    with pytest.raises(ValueError, match="needs per-example values"):
        first.bootstrap_ci()
    with pytest.raises(KeyError, match="'head' was not patched"):
        effects.to_patching_result()
    layers = [key for key in effects.gates if key != ("mlp", 1)]
    few = tlnp.crosscheck.Effects({key: effects.gates[key] for key in layers}, effects.space, "denoise", "m", 1.0, 0.0, 4)
    flat = few.to_patching_result("mlp")
    assert flat.axis_names == [] and flat.values.shape == (2,) and flat.index_df["layer"].tolist() == [0, 2]


@pytest.mark.skipif(hasattr(patching, "PatchingResult"), reason="TransformerLens 4 has it")
def test_without_the_type_there_is_a_word_about_it(toy: Toy) -> None:
    with pytest.raises(ImportError, match="no PatchingResult, 4.3 has"):
        attribution_patching(toy[0], toy[1][:2], ["head"]).to_patching_result()
