"""Real small language models on their tasks. They are no part of the project: TL_NODEPRUNE_MODELS names their folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import pytest
import torch
from integration_support import run
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

import tl_nodeprune as tlnp
from tl_nodeprune.nodes import find_nodes

TASKS = ("ioi0", "ioi4", "ioi6", "pronoun_name", "pronoun_gender_noun", "subject_tracking")
N_LEAVES = 5376  # stories3M: 6 layers of 192 attention, 512 MLP and 192 output neurons


def folder(name: str) -> Path:
    given = os.environ.get("TL_NODEPRUNE_MODELS")
    if not given:
        pytest.skip("TL_NODEPRUNE_MODELS is not set; it names the folder that holds stories3M and stories260K")
    if not (path := Path(given) / name).is_dir():
        pytest.skip(f"TL_NODEPRUNE_MODELS={given} holds no {name}")
    return path


def load(name: str) -> Any:
    path = folder(name)
    hf, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    return TransformerBridge.boot_transformers(str(path), hf_model=hf, tokenizer=tokenizer, device="cpu").eval()


def task(name: str, which: str) -> tlnp.PromptPairs:
    """A task's prompts from tasks.json, padded on the right, answers predicted at the last real token."""
    rows = json.loads((folder(name) / "tasks.json").read_text())[which]
    lengths = torch.tensor([len(row["clean_ids"]) for row in rows])
    width = int(lengths.max())

    def padded(key: str) -> torch.Tensor:
        return torch.tensor([row[key] + [0] * (width - len(row[key])) for row in rows])

    return tlnp.PromptPairs(padded("clean_ids"), padded("corrupt_ids"), torch.tensor([row["answer_id"] for row in rows]),
                            torch.tensor([row["wrong_id"] for row in rows]), torch.arange(width)[None] < lengths[:, None])


def measure(model: Any, which: str, max_kl: float = 0.05, **search: Any) -> dict[str, Any]:
    """One task's figures: half of the prompts that the model answers right to search on, the others to judge on."""
    train, test = task("stories3M", which).correct(model).split(0.5, seed=0)
    masks = model.add_node_masks()
    try:
        result = masks.prune(train, max_kl=max_kl, progress=False, **search)
    finally:
        model.remove_node_masks()
    report, count = tlnp.evaluate(model, result.circuit, test), result.circuit.count()
    live = count["attn_neuron"] + count["mlp_neuron"] + count["mlp_out"]
    assert live == result.circuit.size and result.circuit.size_total == N_LEAVES
    return {"converged": result.converged, "train_kl": result.search_kl, "kl": report.kl, "accuracy": report.accuracy, "live": live,
            "share": live / N_LEAVES, "seconds": result.seconds}


@pytest.fixture(scope="module")
def stories3m() -> Any:
    return load("stories3M")


@pytest.fixture(scope="module")
def figures(stories3m: Any) -> dict[str, dict[str, Any]]:
    """Filled by the tests below, a task each; the last of them adds what is missing when it runs alone."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("which", TASKS)
def test_each_task_is_pruned_within_its_budget(stories3m: Any, figures: dict[str, dict[str, Any]], which: str) -> None:
    figures[which] = found = measure(stories3m, which)
    print(f"{which}: {found}")
    assert found["converged"] and found["train_kl"] <= 0.05
    assert found["accuracy"] >= 0.95 and found["kl"] <= 0.15
    assert found["seconds"] < 180


@pytest.mark.slow
def test_circuits_are_small_over_all_tasks(stories3m: Any, figures: dict[str, dict[str, Any]]) -> None:
    for which in TASKS:
        if which not in figures:
            figures[which] = measure(stories3m, which)
    table = pd.DataFrame(figures).T
    print(table.to_string())
    shares = [figures[which]["share"] for which in TASKS]
    assert median(shares) <= 0.12 and max(shares) <= 0.60, table.to_string()


def test_the_parts_of_the_slow_tests_work_on_a_short_search(stories3m: Any) -> None:
    found = measure(stories3m, "ioi0", max_kl=1.0, steps=5)
    assert 0 < found["share"] <= 1 and found["kl"] >= 0 and 0 <= found["accuracy"] <= 1


@pytest.mark.parametrize("which", ["pronoun_name", "pronoun_gender_noun"])
def test_stories260k_is_pruned_to_a_count(which: str) -> None:
    model, prompts = load("stories260K"), task("stories260K", which)
    right = prompts.correct(model)
    assert len(right) >= 0.5 * len(prompts)
    plain, masks = run(model, right.clean), model.add_node_masks()
    assert torch.equal(run(model, right.clean), plain)
    result = masks.prune(right, steps=10, max_nodes=0.2, progress=False)
    with masks.paired(right):
        assert not torch.equal(run(model, right.clean), plain)
    model.remove_node_masks()
    assert 0 < result.circuit.size <= round(0.2 * result.circuit.size_total)
    assert torch.equal(run(model, right.clean), plain)


def test_tasks_find_words_of_one_token_where_a_space_is_put_before_every_text() -> None:
    """Its tokenizer, Llama 2's, reads " Mary" alone as two tokens."""
    model = load("stories3M")
    prompts = tlnp.tasks.ioi(model, n=20, seed=0)
    assert {token[0] for token in model.tokenizer.convert_ids_to_tokens(prompts.answers.tolist())} == {"\u2581"}
    assert len(prompts.correct(model)) > 10 and len(tlnp.tasks.gendered_pronoun(model, n=20, seed=0).correct(model)) == 20
    with pytest.raises(ValueError, match="greater_than needs a tokenizer that splits"):
        tlnp.tasks.greater_than(model, n=2, seed=0)


def test_one_head_that_looks_at_the_repeated_name_and_one_mlp_carry_ioi(stories3m: Any) -> None:
    """Head 4.4 attends to the second occurrence of the name that is not the answer, and lowers its logit."""
    prompts = task("stories3M", "ioi0").correct(stories3m)[:16]
    found = tlnp.explain(stories3m, tlnp.Circuit.full(find_nodes(stories3m).restrict(("head", "mlp"))), prompts, nodes=3)
    head, mlp = found.nodes[:2]
    assert (head.name, mlp.name) == ("head 4.4", "MLP 5") and head.effect < -10 and head.stands_out and mlp.stands_out
    assert head.attention()[0][0] == "the wrong answer (second time)" and head.to_wrong < -2 < head.to_answer
    assert found.edges.iloc[:2]["sender"].tolist() == ["head 4.4", "head 4.4"]
    assert "cutting head 4.4 lowers it by" in found.text and "mostly lowers the wrong answer's logit" in found.text
