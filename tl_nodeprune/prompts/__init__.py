"""Prompts in pairs, clean and corrupted, with the answers that tell them apart.

pairs       PromptPairs: batches, split, the logit difference of its answers
strings     pairs of strings as tokens, the answers after them, and words for tokens
checks      token ids, answers and padding that do not fit together
tasks       the tasks of circuit papers, made for a model's tokenizer
preference  whether the full model does the task at all, and in both directions
"""

from __future__ import annotations

from tl_nodeprune.prompts import tasks
from tl_nodeprune.prompts.checks import FILL
from tl_nodeprune.prompts.pairs import PromptPairs, check_pairs, positions, read_rows
from tl_nodeprune.prompts.preference import FEWEST_PROMPTS, TASK_LEVEL, Preference, Sample, by_prompt, preference

__all__ = [
    "FILL", "FEWEST_PROMPTS", "TASK_LEVEL", "Preference", "PromptPairs", "Sample", "by_prompt", "check_pairs", "positions", "preference",
    "read_rows", "tasks",
]
