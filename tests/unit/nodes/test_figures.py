"""Numbers as they are printed."""

from __future__ import annotations

import math
from typing import Any

import pytest

import tl_nodeprune as tlnp
from tl_nodeprune.nodes import figures

Toy = tuple[Any, tlnp.PromptPairs]


@pytest.mark.parametrize(("value", "text"), [
    (0.05213, "0.0521"), (12.345, "12.3"), (2.3283064365386963e-10, "2.33e-10"), (1234.5, "1,230"), (5376, "5,376"), (0.98, "0.98"),
    (999.6, "1,000"), (-0.0704999, "-0.0705"), (0.0, "0"), (1.0, "1"), (math.nan, "nan"), (math.inf, "inf"), (1e9, "1e+09"), (7, "7")])
def test_three_figures(value: float, text: str) -> None:
    assert figures(value) == text


def test_results_print_three_figures(toy: Toy) -> None:
    """No number of a result's repr, nor of an evaluation's, has more than three figures, but for whole ones."""
    import re

    model, prompts = toy
    result = tlnp.prune(model, prompts, max_nodes=3, steps=2, granularities=["head", "mlp"], progress=False)
    test = tlnp.hypotheses.equivalence(prompts.logit_diff(full := model(prompts.clean)[:, -1].detach()), full[:, 0])
    for text in (repr(result), repr(tlnp.evaluate(model, result.circuit, prompts)), repr(test), repr(result.history[0])):
        for number in re.findall(r"\d+\.\d+(?:e[+-]\d+)?", text):
            assert len(number.split("e")[0].replace(".", "").lstrip("0")) <= 3, (number, text)
    assert f"kl={figures(result.kl)}, " in repr(result) and "p_value=" in repr(test)
