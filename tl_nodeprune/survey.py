"""What a search and a ranking start from: attached masks that are checked, the prompts to search on, the landscape over them."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

from tl_nodeprune.budget import Budget
from tl_nodeprune.hooks import find_attachment
from tl_nodeprune.landscape import Landscape
from tl_nodeprune.masks import NodeMasks
from tl_nodeprune.objective import Reference
from tl_nodeprune.preference import Preference, Sample, preference
from tl_nodeprune.probe import check_ready
from tl_nodeprune.prompts import PromptPairs, check_pairs


def searchable(masks: NodeMasks, prompts: PromptPairs, *, stacklevel: int) -> Any:
    """The model of masks that a search can use. Raises what `prune` says it raises for masks and prompts. stacklevel: of a warning."""
    model = masks.model
    check_pairs(prompts)
    attachment = find_attachment(model)
    if attachment is None or attachment.owner is not masks:
        raise RuntimeError("a circuit is applied to this model; leave its `with` block before pruning.")
    if not attachment.active:
        raise RuntimeError("the masks are switched off here; leave `with masks.inactive()` before pruning.")
    check_ready(model)
    prompts.check_fits(model)
    prompts.check_corrupted(masks.asked_ablation.name)
    if prompts.n_same and masks.asked_ablation.name == "interchange":
        warnings.warn(f"{prompts.n_same} of the {len(prompts)} corrupted prompts are the same as the clean ones: nothing is ablated there, "
                      "and any circuit is right on them.", stacklevel=stacklevel)
    return model


class Survey(NamedTuple):
    """landscape: over all free nodes; sample: the prompts to search on, of one direction or both; pairs: what the full model does on the
    prompts given, None where it was not asked."""

    landscape: Landscape
    sample: Sample
    pairs: Preference | None


def survey(masks: NodeMasks, prompts: PromptPairs, budget: Budget, *, both_ways: bool, batch_size: int, cache_bytes: int) -> Survey:
    """Fit the ablation, run the full model, keep the stand-ins. Call it with the masks inactive. both_ways: pairs that are prompts of the
    task in either direction are searched on in both; for a loss that says how like the full model's the output is."""
    model, space = masks.model, masks.space
    ablation = masks.asked_ablation.fit(model, prompts, space.hooks, batch_size=batch_size)
    pairs = preference(model, prompts, batch_size) if both_ways else None
    sample = pairs.sample() if pairs else Sample.of(prompts)
    hooks = tuple(dict.fromkeys(key.hook for key in space.free()))
    reference = Reference(model, sample.prompts, ablation, hooks, batch_size=batch_size, cache_bytes=cache_bytes)
    return Survey(Landscape(space, reference, budget, sample.groups), sample, pairs)
