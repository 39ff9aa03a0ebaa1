"""Prompts in pairs, clean and corrupted, with the answers that tell them apart.

pairs       PromptPairs: from strings, batches, split, the logit difference of its answers
checks      token ids, answers and padding that do not fit together
tasks       the tasks of circuit papers, made for a model's tokenizer
preference  whether the full model does the task at all, and in both directions
"""

from __future__ import annotations

from tl_nodeprune.prompts import tasks
from tl_nodeprune.prompts.pairs import PromptPairs, check_pairs, positions
from tl_nodeprune.prompts.preference import FEWEST, SIGNIFICANT, Preference, Sample, by_prompt, preference

__all__ = [
    "FEWEST", "SIGNIFICANT", "Preference", "PromptPairs", "Sample", "by_prompt", "check_pairs", "positions", "preference", "tasks",
]
