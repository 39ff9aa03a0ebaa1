"""Attaching and removing masks: every refusal, and that nothing is attached after one."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import tl_nodeprune as tlnp
from tl_nodeprune.nodes.attachment import find_attachment, temporary_hooks
from tl_nodeprune.nodes.probe import find_nodes
from tl_nodeprune.nodes.space import GateKey, NodeSpace

Toy = tuple[Any, tlnp.PromptPairs]


@pytest.mark.parametrize(("options", "text"), [
    ({"granularities": ["head", "neuron"]}, "unknown granularity 'neuron'; allowed: layer, attn"),
    ({"granularities": "heads"}, "unknown granularity 'heads'"),
    ({"granularities": []}, "granularities is empty"),
    ({"layers": [0, 3]}, "layer 3 does not exist; this model has layers 0 to 2"),
    ({"layers": [-4]}, "layer -4 does not exist"),
    ({"layers": ["0"]}, "layers must be .*several whole numbers.*but it holds '0'"), ({"layers": True}, "layers=True; it must be"),
    ({"layers": [True]}, "layers must be .*but it holds True"), ({"gate": tlnp.HardConcrete}, "gate must be a Gate, got the class Hard"),
    ({"layers": []}, "layers is empty"),
    ({"ablation": "noise"}, "unknown ablation 'noise'; allowed: interchange, mean, zero, optimal"),
])
def test_refusals_attach_nothing(toy: Toy, no_hooks_left: Callable[[Any], None], options: dict[str, Any], text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        toy[0].add_node_masks(**options)
    no_hooks_left(toy[0])


def test_a_granularity_that_the_model_lacks() -> None:
    present = {GateKey("layer", 0): (), GateKey("attn", 0): (), GateKey("head", 0): (2,), GateKey("attn_neuron", 0): (2, 3)}
    space = NodeSpace(present, present, d_model=6, n_layers=1, kv_heads=2, gated_mlp=False)
    with pytest.raises(ValueError, match="this model has no 'mlp_neuron' nodes; it has: layer, attn, head, attn_neuron"):
        space.restrict(["head", "mlp_neuron"])
    assert space.restrict(None).granularities == ("layer", "attn", "head", "attn_neuron")


def test_no_transformer_lens_model() -> None:
    with pytest.raises(TypeError, match="HookedTransformer or TransformerBridge, got Linear"):
        tlnp.add_node_masks(nn.Linear(2, 2))


def test_masks_twice_and_removal_of_none(toy: Toy) -> None:
    model, prompts = toy
    with pytest.raises(RuntimeError, match="no node masks to remove"):
        model.remove_node_masks()
    masks = model.add_node_masks(("head",))
    try:
        with pytest.raises(RuntimeError, match="node masks are attached to this model already"):
            model.add_node_masks(("mlp",))
        with pytest.raises(RuntimeError, match="attached to this model already"), masks.to_circuit().applied(model, prompts):
            pass
        assert masks.attached
    finally:
        model.remove_node_masks()
    masks.remove()  # the second time does nothing
    with pytest.raises(RuntimeError, match="not attached to a model"):
        _ = masks.model
    with tlnp.Circuit.empty(masks.space).applied(model, prompts):  # (a full circuit needs no hook at all)
        with pytest.raises(RuntimeError, match="a circuit is attached to this model already"):
            model.add_node_masks()
        with pytest.raises(RuntimeError, match="no node masks to remove"):
            model.remove_node_masks()
        with pytest.raises(RuntimeError, match="a circuit is applied"):
            tlnp.evaluate(model, masks.to_circuit(), prompts)


def test_training_mode_with_dropout(fresh_toy: Toy, no_hooks_left: Callable[[Any], None]) -> None:
    model, prompts = fresh_toy
    circuit = tlnp.Circuit.full(find_nodes(model))
    model.train()
    next(module for module in model.modules() if isinstance(module, nn.Dropout)).p = 0.1
    for use in (model.add_node_masks, lambda: tlnp.evaluate(model, circuit, prompts), lambda: circuit.fwd_hooks(model, prompts)):
        with pytest.raises(RuntimeError, match="training mode with dropout.*model.eval"):
            use()
    no_hooks_left(model)
    model.eval()
    masks = model.add_node_masks()
    model.train()
    spare = tlnp.NodeMasks(masks.space)
    for use in (lambda: masks.prune(prompts, max_kl=0.1, progress=False), lambda: masks.paired(prompts), lambda: prompts.correct(model),
                lambda: tlnp.Ablation("mean").fit(model, prompts, masks.space.hooks)):
        with pytest.raises(RuntimeError, match="training mode with dropout"):
            use()
    masks.remove()
    for put_on in (spare.attach, spare.on):
        with pytest.raises(RuntimeError, match="training mode with dropout"):
            put_on(model)


def test_nodes_of_the_toy(each_toy: Toy) -> None:
    space = find_nodes(each_toy[0])
    assert space.totals() == {"layer": 3, "attn": 3, "mlp": 3, "head": 12, "attn_neuron": 288, "mlp_neuron": 1152, "mlp_out": 288}
    assert tlnp.Circuit.full(space).parameters == 3 * 12 * 96 * 96  # 4 attention matrices, 2 of the MLP with 4 times the width
    only = space.restrict(("head",), layers=[-1])
    assert only.hooks == ("blocks.2.attn.hook_z",) and only.layers == (2,)


def test_set_to_and_back(toy: Toy) -> None:
    space = find_nodes(toy[0])
    masks = tlnp.NodeMasks(space)
    generator = torch.Generator().manual_seed(0)
    circuit = tlnp.Circuit(space, {key: torch.rand(shape, generator=generator) < 0.6 for key, shape in space.shapes.items()})
    masks.set_to(circuit)
    assert masks.to_circuit() == circuit
    assert all(torch.equal(masks.as_dict()[hook], circuit[hook]) for hook in circuit)


def test_sampling_draws_afresh_and_reproducibly(toy: Toy) -> None:
    masks = tlnp.NodeMasks(find_nodes(toy[0]).restrict(("mlp_neuron",)))
    with torch.no_grad():
        for score in masks.parameters():
            score.zero_()
    hook = "blocks.0.mlp.hook_post"
    with masks.sampling(torch.Generator().manual_seed(0)):
        a, b = masks.mask(hook), masks.mask(hook)
    with masks.sampling(torch.Generator().manual_seed(0)):
        assert torch.equal(masks.mask(hook), a) and not torch.equal(a, b)
    assert (masks.mask(hook) == 0.5).all()  # deterministic again outside


@pytest.mark.parametrize("enter", [lambda stack, masks: stack.enter_context(masks), lambda stack, masks: masks.__enter__()])
def test_a_with_block_takes_masks_off_however_it_ends(toy: Toy, enter: Callable[[Any, Any], Any]) -> None:
    model = toy[0]
    with pytest.raises(KeyboardInterrupt):
        with model.add_node_masks(("head",)) as masks:
            assert masks.attached and isinstance(masks, tlnp.NodeMasks)
            raise KeyboardInterrupt
    assert not masks.attached
    with model.add_node_masks(("head",)) as masks:
        model.remove_node_masks()  # before its end
        other = model.add_node_masks(("mlp",))
    assert other.attached
    with contextlib.ExitStack() as stack:
        assert enter(stack, other) is other and other.attached
        with pytest.raises(RuntimeError, match="entered before"):
            other.__enter__()
        stack.callback(other.remove)
    assert not other.attached and all(p.requires_grad for p in model.parameters())
    with pytest.raises(RuntimeError, match="not attached to a model"):
        with masks:
            pass
    assert hasattr(masks, "__exit__")


def test_a_cell_that_is_run_again_gets_new_masks(toy: Toy) -> None:
    """The earlier ones say that they are off; masks over other nodes, or under another ablation, are not replaced."""
    model, prompts = toy

    def cell(**budget: Any) -> tlnp.NodeMasks:
        masks: tlnp.NodeMasks = model.add_node_masks(["head", "mlp"], layers=[0])
        masks.set_to(tlnp.Circuit.empty(masks.space))
        masks.prune(prompts, steps=5, progress=False, **budget)
        return masks

    try:
        with pytest.raises(KeyboardInterrupt):
            cell(loss=interrupted, max_loss=1.0)
        earlier = find_attachment(model).owner  # type: ignore[union-attr]
        with pytest.warns(UserWarning, match="these new ones take their place"):
            new = cell(max_nodes=2)
        assert new.attached and not earlier.attached and new is not earlier
        with pytest.raises(RuntimeError, match="not attached"), earlier.paired(prompts):
            pass
        for other in ({"layers": [0]}, {"granularities": "head"}, {"granularities": ["head", "mlp"], "layers": 0, "ablation": "zero"}):
            with pytest.raises(RuntimeError, match="attached to this model already"):
                model.add_node_masks(**other)
        with pytest.raises(ValueError, match="unknown granularity"):
            model.add_node_masks("heads")
        assert new.attached
    finally:
        model.remove_node_masks()


def interrupted(*_: Any) -> torch.Tensor:
    raise KeyboardInterrupt


def test_masks_gone_with_permanent_hooks_can_still_be_removed(fresh_toy: Toy) -> None:
    """A user's `reset_hooks(including_permanent=True)` takes our hooks too; the weights must not stay frozen for ever."""
    model, _ = fresh_toy
    masks = model.add_node_masks()
    model.reset_hooks(including_permanent=True)
    assert not masks.attached
    masks.remove()
    assert all(p.requires_grad for p in model.parameters())


def test_arguments_in_the_order_of_the_method(toy: Toy) -> None:
    masks = toy[0].add_node_masks(["head"], [-1], "zero")
    toy[0].remove_node_masks()
    assert masks.space.hooks == ("blocks.2.attn.hook_z",) and masks.ablation.name == "zero"


def test_permanent_hooks_reset_by_the_user(fresh_toy: Toy, no_hooks_left: Callable[[Any], None]) -> None:
    """The model's own method removes what is left of such masks, and new masks do not suffer from the old ones' removal."""
    model, _ = fresh_toy
    model.add_node_masks(("head",))
    model.reset_hooks(including_permanent=True)
    model.remove_node_masks()
    assert all(p.requires_grad for p in model.parameters())
    old = model.add_node_masks(("head",))
    model.reset_hooks(including_permanent=True)
    new = model.add_node_masks(("mlp",))
    old.remove()
    assert new.attached and not any(p.requires_grad for p in model.parameters())
    with pytest.raises(RuntimeError, match="attached to this model already"):
        model.add_node_masks()
    model.remove_node_masks()
    no_hooks_left(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda masks: pickle.loads(pickle.dumps(masks))])
def test_a_copy_has_the_gates_and_no_model(toy: Toy, copied: Callable[[tlnp.NodeMasks], tlnp.NodeMasks]) -> None:
    masks = toy[0].add_node_masks(("head",))
    try:
        with torch.no_grad():
            masks.score(GateKey("head", 1)).fill_(-1)
        with masks.paired(toy[1]), masks.sampling(torch.Generator()):
            twin = copied(masks)
        assert masks.attached and not twin.attached and twin.to_circuit() == masks.to_circuit()
        assert torch.equal(twin.mask("blocks.1.attn.hook_z"), masks.mask("blocks.1.attn.hook_z"))
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in masks.parameters()}
    finally:
        toy[0].remove_node_masks()


def all_closed(model: Any, granularity: str = "head") -> tlnp.NodeMasks:
    masks = model.add_node_masks((granularity,), ablation="zero")
    masks.set_to(tlnp.Circuit.empty(masks.space))
    return masks


@torch.no_grad()
def test_a_copy_of_a_masked_model_is_the_plain_model(each_toy: Toy, no_hooks_left: Callable[[Any], None]) -> None:
    model, prompts = each_toy
    plain, masks = model(prompts.clean), all_closed(model)
    masked = model(prompts.clean)
    twin, removed, part = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model.blocks[0])
    removed.remove_node_masks()  # as a script may that knew the original
    with pytest.raises(RuntimeError, match="no node masks to remove"):
        removed.remove_node_masks()
    for one in (twin, removed, copy.deepcopy(twin)):
        assert torch.equal(one(prompts.clean), plain)
        assert all(p.requires_grad for p in one.parameters())
        no_hooks_left(one)
    assert all(p.requires_grad for p in part.parameters())
    assert torch.equal(model(prompts.clean), masked) and masks.attached and not any(p.requires_grad for p in model.parameters())
    own = all_closed(twin, "mlp")
    model.remove_node_masks()
    assert own.attached and torch.equal(model(prompts.clean), plain) and not torch.equal(twin(prompts.clean), plain)
    with own.to_circuit().applied(model, prompts):
        assert torch.equal(copy.deepcopy(model)(prompts.clean), plain)


@torch.no_grad()
def test_a_pickled_model_has_no_masks(each_toy: Toy) -> None:
    model, prompts = each_toy
    try:
        pickle.dumps(model)
    except AttributeError:
        pytest.skip("TransformerLens' bridge does not pickle")
    plain, masks = model(prompts.clean), all_closed(model)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(prompts.clean), plain) and all(p.requires_grad for p in twin.parameters())
    masks.remove()
    assert b"tl_nodeprune.nodes.attachment" not in pickle.dumps(model)


@torch.no_grad()
def test_masks_follow_the_model_to_another_dtype(fresh_toy: Toy) -> None:
    model, prompts = fresh_toy
    plain, masks = model(prompts.clean), all_closed(model)
    masked = model(prompts.clean)
    model.to(torch.float64)
    assert torch.allclose(model(prompts.clean).float(), masked, atol=1e-3)
    model.to(torch.float32)
    masks.remove()
    assert torch.equal(model(prompts.clean), plain) and all(p.requires_grad for p in model.parameters())


def test_a_second_thread_is_refused(toy: Toy) -> None:
    model, prompts = toy
    circuit, found = tlnp.Circuit.empty(find_nodes(model)), list[str]()

    def evaluate() -> None:
        try:
            tlnp.evaluate(model, circuit, prompts)
        except RuntimeError as error:
            found.append(str(error))

    def in_a_thread() -> None:
        thread = threading.Thread(target=evaluate)
        thread.start()
        thread.join()

    plain = model(prompts.clean)
    with temporary_hooks(model, [("blocks.0.attn.hook_z", lambda z, hook: z * 0)]):
        in_a_thread()
        with ThreadPoolExecutor() as pool:  # a plain forward of another thread sees nothing of it
            assert torch.equal(pool.submit(model, prompts.clean).result(), plain)
        assert not torch.equal(model(prompts.clean), plain)
    assert len(found) == 1 and "another thread is at work on this model" in found[0]
    in_a_thread()
    assert len(found) == 1


def test_gradient_checkpointing_is_refused(fresh_toy: Toy, no_hooks_left: Callable[[Any], None]) -> None:
    model, prompts = fresh_toy
    masks = model.add_node_masks(("head",))
    model.original_model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(RuntimeError, match="gradient_checkpointing_disable"):
        masks.prune(prompts, max_kl=0.1, progress=False)
    with pytest.raises(RuntimeError, match="gradient_checkpointing_disable"):
        masks.paired(prompts)
    model.eval()
    with masks.paired(prompts), masks.sampling(torch.Generator()):
        model.train()  # after the look at it
        loss = model(prompts.clean).sum()
        with pytest.raises(RuntimeError, match="runs the model again in the backward pass"):
            loss.backward()
    model.remove_node_masks()
    with pytest.raises(RuntimeError, match="gradient_checkpointing_disable"):
        model.add_node_masks()
    no_hooks_left(model)
    model.eval()  # without it nothing is checkpointed
    model.add_node_masks()


def test_inference_mode(toy: Toy) -> None:
    model, prompts = toy
    masks = model.add_node_masks(("head",))
    circuit = tlnp.Circuit.empty(masks.space)
    outside = tlnp.evaluate(model, circuit, prompts).kl
    try:
        with torch.inference_mode():
            inside = tlnp.PromptPairs(*(getattr(prompts, name).clone() for name in ("clean", "corrupted", "answers", "wrong_answers")))
            assert tlnp.evaluate(model, circuit, prompts).kl == outside
            for search in (lambda: masks.prune(prompts, max_kl=0.1), lambda: tlnp.rank(masks, prompts),
                           lambda: tlnp.crosscheck.attribution_patching(model, prompts), lambda: tlnp.report(model, circuit, prompts)):
                with pytest.raises(RuntimeError, match="torch.inference_mode"):
                    search()
        masks.prune(inside, max_nodes=2, steps=1, progress=False)  # of prompts made in it
    finally:
        model.remove_node_masks()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_default_dtype_changes_nothing(toy: Toy, dtype: torch.dtype) -> None:
    model, prompts = toy[0], toy[1][:8]

    def numbers() -> tuple[Any, ...]:
        masks = model.add_node_masks(("head",))
        try:
            result = masks.prune(prompts, max_kl=0.5, steps=1, exact_tests=1, progress=False)
            with masks.sampling(torch.Generator().manual_seed(0)):
                drawn = masks.mask("blocks.1.attn.hook_z").detach()
        finally:
            model.remove_node_masks()
        return result.circuit.count(), result.kl, drawn.tolist(), tlnp.evaluate(model, result.circuit, prompts).kl

    before = numbers()
    torch.set_default_dtype(dtype)
    try:
        assert numbers() == before
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_hook_of_the_user_that_the_probe_breaks_is_named(fresh_toy: Toy) -> None:
    model, _ = fresh_toy

    def sixth(x: torch.Tensor, hook: Any) -> None:
        x[:, 5] += 1

    model.add_hook("blocks.1.hook_resid_mid", sixth)
    with pytest.raises(ValueError, match=r"IndexError.*hooks of your own on it, at .*blocks\.1\.hook_resid_mid.*model\.reset_hooks"):
        model.add_node_masks()
    model.reset_hooks()
    model.add_hook("blocks.1.hook_resid_post", lambda x, hook: x * 3)
    with pytest.raises(ValueError, match=r"your own hooks do that, at .*blocks\.1\.hook_resid_post"):
        model.add_node_masks()


def test_set_to_a_circuit_over_other_nodes_sets_nothing(toy: Toy, other_model: Any) -> None:
    space = find_nodes(toy[0])
    masks, heads = tlnp.NodeMasks(space.restrict(layers=[0, 1])), tlnp.NodeMasks(space.restrict(("head",), [0]))
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.hook_z with head nodes \[4\], the circuit has \[2\]"):
        masks.set_to(tlnp.Circuit.empty(find_nodes(other_model)))
    with pytest.raises(ValueError, match=r"blocks\.1\.hook_resid_post with layer nodes \[\], the circuit has none there"):
        masks.set_to(tlnp.Circuit.empty(space.restrict(layers=[0])))
    assert masks.to_circuit() == tlnp.Circuit.full(masks.space)
    heads.set_to(tlnp.Circuit.empty(space))  # more than is gated here will do
    assert heads.to_circuit().size == 0


def test_paired_with_prompts_of_another_tokenizer(toy: Toy) -> None:
    bad = tlnp.PromptPairs(toy[1].clean, toy[1].corrupted + 500, toy[1].answers, toy[1].wrong_answers)
    masks = toy[0].add_node_masks()
    try:
        with pytest.raises(ValueError, match="corrupted holds token id .* vocabulary ends at 198"), masks.paired(bad):
            pass
    finally:
        toy[0].remove_node_masks()


def test_other_prompts_inside_paired_are_refused(toy: Toy) -> None:
    model, prompts = toy
    masks = model.add_node_masks(("head",))
    try:
        with masks.paired(prompts), pytest.raises(ValueError, match="the first is prompt 0"):
            model(prompts.corrupted)
        with masks.paired(prompts), masks.inactive():
            model(prompts.corrupted)
        turned = tlnp.PromptPairs(prompts.corrupted, prompts.clean, prompts.wrong_answers, prompts.answers, prompts.attention_mask)
        with masks.paired(prompts):
            with masks.paired(turned):
                model(turned.clean)
            model(prompts.clean)
    finally:
        model.remove_node_masks()


def test_reset_hooks_and_a_circuit_do_not_leave_the_weights_frozen(fresh_toy: Toy) -> None:
    model, prompts = fresh_toy
    masks = model.add_node_masks(("head",))
    model.reset_hooks(including_permanent=True)
    with tlnp.Circuit.empty(masks.space).applied(model, prompts):
        pass
    assert all(p.requires_grad for p in model.parameters())


def test_nan_weights_are_no_matter_of_node_finding(fresh_toy: Toy) -> None:
    """They are named by `prune`, where logits are looked at."""
    model, prompts = fresh_toy
    with torch.no_grad():
        next(iter(model.parameters())).fill_(torch.nan)
    masks = model.add_node_masks()
    with pytest.raises(FloatingPointError, match="NaN or inf in the logits of the full model"):
        masks.prune(prompts, max_kl=0.1, progress=False)
    model.remove_node_masks()


def test_padding_is_looked_at_without_the_user_s_hooks(toy: Toy) -> None:
    """A hook that hides a later token's influence for a while does not settle what the model does without it."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(use_bidirectional_attention=True, vocab_size=199, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                              num_key_value_heads=2, head_dim=8, intermediate_size=64, initializer_range=0.2,
                              architectures=["Gemma3ForCausalLM"])
    hf = Gemma3ForCausalLM(config).eval()
    model = TransformerBridge.boot_transformers("google/gemma-3-1b-pt", hf_model=hf, tokenizer=toy[0].tokenizer, device="cpu").eval()
    tokens = torch.randint(1, 199, (2, 2, 9))
    padded = tlnp.PromptPairs(tokens[0], tokens[1], torch.tensor([1, 2]), torch.tensor([3, 4]), torch.arange(9) < torch.tensor([[5], [9]]))
    model.add_hook("blocks.1.hook_resid_post", lambda stream, hook: stream * 0)
    padded.check_fits(model)
    model.reset_hooks()
    with pytest.raises(ValueError, match="attention in this model is not causal"):
        padded.check_fits(model)


def test_a_check_of_prompts_goes_with_the_masks(fresh_toy: Toy) -> None:
    model, prompts = fresh_toy
    masks = model.add_node_masks()
    with masks.paired(prompts):
        model.reset_hooks(including_permanent=True)
        model(prompts.corrupted)  # no mask is on the model, so nothing is refused
    tlnp.add_node_masks(model).remove()
    assert all(p.requires_grad for p in model.parameters())


def test_scores_that_are_nan_make_no_circuit(toy: Toy) -> None:
    masks = tlnp.NodeMasks(find_nodes(toy[0]).restrict(("head",)))
    with torch.no_grad():
        masks.scores["head_0"][0] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN in the scores of head_0"):
        masks.to_circuit()
