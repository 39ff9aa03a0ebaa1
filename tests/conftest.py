"""Fixtures: the embedded model on its own task, and the check that this library leaves nothing on a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import tl_nodeprune as tlnp
from tl_nodeprune.nodes.attachment import find_attachment

Toy = tuple[Any, tlnp.PromptPairs]


def assert_no_hooks(model: Any) -> None:
    """No attachment of ours, and no hook of anybody's."""
    assert find_attachment(model) is None
    left = {name: len(point.fwd_hooks) for name, point in dict(model.hook_dict).items() if point.fwd_hooks}
    assert not left, f"hooks left: {left}"


@pytest.fixture(scope="session")
def no_hooks_left() -> Callable[[Any], None]:
    return assert_no_hooks


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """The benchmarks set the number of threads, and with it the last digit of a float changes."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def toy() -> Toy:
    return tlnp.toy.load("ioi", n=24)


@pytest.fixture(scope="session")
def others(toy: Toy) -> tlnp.PromptPairs:
    """Sixteen different prompts of the toy's task, none of them among its own."""
    more, own = tlnp.toy.load("ioi", n=80)[1].without_repeats(), toy[1].clean.tolist()
    return more[[i for i, row in enumerate(more.clean.tolist()) if row not in own][:16]]


@pytest.fixture(scope="session", params=["TransformerBridge", "HookedTransformer"])
def each_toy(request: pytest.FixtureRequest) -> Toy:
    """The embedded model as each of TransformerLens' classes; HookedTransformer is gone from version 4."""
    try:
        return tlnp.toy.load("ioi", n=24, model_class=request.param)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture()
def fresh_toy() -> Toy:
    """A model of its own for tests that change it."""
    return tlnp.toy.load("ioi", n=24)


@pytest.fixture()
def frozen_toy(toy: Toy) -> Iterator[Toy]:
    """The embedded model with its weights frozen, as they are while masks are attached."""
    toy[0].requires_grad_(False)
    yield toy
    toy[0].requires_grad_(True)


@pytest.fixture(scope="session")
def other_model(toy: Toy) -> Any:
    """A model of other shape, untrained, with the same tokenizer."""
    from transformer_lens.model_bridge import TransformerBridge

    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_size=199)).eval()
    return TransformerBridge.boot_transformers("gpt2", hf_model=hf, tokenizer=toy[0].tokenizer, device="cpu").eval()


MARKUP = "</script><img src=x onerror=run()>"


@pytest.fixture(scope="session")
def markup_toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """The embedded model with a tokenizer in which the second token of the first prompt is MARKUP."""
    model, prompts = tlnp.toy.load("ioi", n=4)
    folder = tmp_path_factory.mktemp("tokenizer")
    source = json.loads((tlnp.toy.FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = source["model"]["vocab"]
    vocab[MARKUP] = vocab.pop(next(name for name, number in vocab.items() if number == int(prompts.clean[0, 1])))
    (folder / "tokenizer.json").write_text(json.dumps(source), encoding="utf-8")
    (folder / "tokenizer_config.json").write_bytes((tlnp.toy.FOLDER / "tokenizer_config.json").read_bytes())
    model.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return model, prompts


@pytest.fixture(autouse=True)
def _shared_models_stay_clean(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test that uses a shared model must leave it without hooks; a test that fails must not spoil the next."""
    models = [request.getfixturevalue(name)[0] for name in ("toy", "each_toy") if name in request.fixturenames]
    yield
    try:
        for model in models:
            assert_no_hooks(model)
            assert all(p.requires_grad for p in model.parameters())
    finally:
        for model in models:
            for point in dict(model.hook_dict).values():
                point.remove_hooks("both", including_permanent=True)
                point.ctx.clear()
            model.requires_grad_(True)
