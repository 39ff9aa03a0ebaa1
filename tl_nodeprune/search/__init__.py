"""From attached masks and prompts to a circuit.

A search is one run. `nested` trains one score per node, so that for every size the nodes of highest score are a circuit; `run` measures
the frontier of size against KL, on prompts that were searched on and on others that never are. `cut` cuts that order where the budget
holds on the others, and `exact_tests` closes each unit and node of what is left in turn, to see that none can be left out. `rank` is
the same run without a cut, `sweep` the same run per seed.

`budget` says what is asked of a circuit, `held_out` what prompts say that were never searched on; `paper` is the paper's own objective,
for comparison.
"""

from __future__ import annotations

from tl_nodeprune.search.checkpoint import NAME as CHECKPOINT
from tl_nodeprune.search.estimate import Estimate, estimate
from tl_nodeprune.search.paper import PaperObjective
from tl_nodeprune.search.prune import prune
from tl_nodeprune.search.rank import rank
from tl_nodeprune.search.result import PruneResult, Step, held_out_sentence
from tl_nodeprune.search.sweep import Sweep, SweepRun, sweep

__all__ = [
    "CHECKPOINT", "Estimate", "PaperObjective", "PruneResult", "Step", "Sweep", "SweepRun", "estimate", "held_out_sentence", "prune",
    "rank", "sweep",
]
