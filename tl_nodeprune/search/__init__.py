"""From attached masks and prompts to a circuit.

A search is one run. `nested` trains one score per node, so that for every size the nodes of highest score are a circuit; `run` measures
the frontier of size against KL, on prompts that were searched on and on others that never are. `prune` cuts that order where the budget
holds on the others, and `finish` makes the circuit better by exchanges planned on a `quadratic`, then smaller, and tests exactly that
nothing more can be left out. `rank` is the same run without the finish, `sweep` the same run per seed.

`landscape` has the losses and gradients that all of this rests on, `budget` what is asked of a circuit, `held_out` what prompts say
that were never searched on, `paper` the paper's own objective for comparison.
"""

from __future__ import annotations

from tl_nodeprune.search.estimate import Estimate, estimate
from tl_nodeprune.search.paper import PaperObjective
from tl_nodeprune.search.prune import PruneResult, Step, prune
from tl_nodeprune.search.rank import rank
from tl_nodeprune.search.sweep import Sweep, SweepRun, sweep

__all__ = ["Estimate", "PaperObjective", "PruneResult", "Step", "Sweep", "SweepRun", "estimate", "prune", "rank", "sweep"]
