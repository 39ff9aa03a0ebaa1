"""What was found about a circuit: the numbers of a report, and what they hold for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd

from tl_nodeprune.circuit import Circuit, Evaluation
from tl_nodeprune.evidence.hypotheses import HypothesisTest
from tl_nodeprune.evidence.redundancy import Redundancy
from tl_nodeprune.evidence.trial import Completeness, RandomDraws


@dataclass(frozen=True)
class Settings:
    """What a report holds for. size: live leaf nodes of size_total. held_out: whether the prompts judged on were given as held out from the
    search. units: "block" or "node"; units_tried of units_kept were taken out one at a time."""

    model: str
    ablation: str
    granularities: tuple[str, ...]
    layers: tuple[int, ...]
    size: int
    size_total: int
    n_prompts: int
    held_out: bool
    units: str
    units_tried: int
    units_kept: int
    n_random: int
    n_subsets: int
    alpha: float
    seed: int

    def __str__(self) -> str:
        seen = "held out from the search" if self.held_out else "none given as held out"
        return (f"a circuit of {self.size:,} of {self.size_total:,} leaf nodes ({', '.join(self.granularities)}; layers "
                f"{', '.join(map(str, self.layers))}) in {self.model or 'an unnamed model'}; {self.ablation} ablation, nodes cut at all "
                f"positions, outputs read at the answer positions; {self.n_prompts} prompts, {seen}; {self.units_tried} of "
                f"{self.units_kept} kept units ({self.units}) tried, {self.n_random} random draws, {self.n_subsets} subsets, "
                f"alpha {self.alpha:g}, seed {self.seed}.")


@dataclass(frozen=True, eq=False)
class Findings:
    """The numbers of a report, not yet judged.

    circuit: the one judged. settings: what all of it holds for. evaluation: on the prompts judged on; searched: on those of the search,
    where others were held out. intervals: 95 %, for the means of the evaluation, by name; NaN for fewer than 10 prompts. task_p: see
    `Preference.p_value`, NaN where there are no corrupted prompts. ablations: the circuit judged under each ablation. effects: a row per
    unit tried, with what its removal does (see `trial.UnitEffects`) and its p-value of `hypotheses.minimality`. redundancies: units that
    can do each other's work; stand_ins_sought, pairs_among: for, and among, how many units they were looked for. notes: what else to know.
    """

    circuit: Circuit = field(repr=False)
    settings: Settings
    evaluation: Evaluation
    searched: Evaluation | None
    intervals: Mapping[str, tuple[float, float]] = field(repr=False)
    task_p: float
    completeness: Completeness
    null: RandomDraws
    equivalence: HypothesisTest
    independence: HypothesisTest
    minimality: HypothesisTest
    ablations: pd.DataFrame
    effects: pd.DataFrame
    redundancies: tuple[Redundancy, ...]
    stand_ins_sought: int
    pairs_among: int
    notes: tuple[str, ...]
