"""How often a report's interval of the KL covers the mean: `python tests/benchmarks/coverage.py [SAMPLES] [SEED]`.

The population: 600 IOI prompts of the embedded model and a circuit of seven heads and an MLP, whose KL is skewed. Samples are drawn from
it with replacement, and each is given `reports.report.bootstrap`, as a report does.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

import tl_nodeprune as tlnp
from tl_nodeprune.evidence.reports.report import bootstrap
from tl_nodeprune.masks.reference import Reference
from tl_nodeprune.nodes.probe import find_nodes
from tl_nodeprune.nodes.space import GateKey

HEADS = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3))
SIZES = (10, 20, 50, 100, 200)


def population() -> NDArray[np.float64]:
    """KL of each prompt."""
    model, prompts = tlnp.toy.load("ioi", n=600)
    space = find_nodes(model).restrict(("head", "mlp"))
    gates = {key: torch.zeros(shape, dtype=torch.bool) for key, shape in space.shapes.items()}
    for layer, head in HEADS:
        gates[GateKey("head", layer)][head] = True
    gates[GateKey("mlp", 0)] = torch.tensor(True)
    circuit = tlnp.Circuit(space, gates)
    runs = Reference(model, prompts, circuit.ablation, space.hooks, batch_size=100)
    return tlnp.kl_divergence(runs.all_logits(circuit), runs.full).double().numpy()


def main(samples: int = 300, seed: int = 0) -> None:
    kl, rng = population(), np.random.default_rng(seed)
    mean = kl.mean()
    print(f"KL of {len(kl)} prompts: mean {mean:.3f}, median {np.median(kl):.3f}, largest {kl.max():.2f}; {samples} samples of each size")
    for size in SIZES:
        ends = np.array([bootstrap(np.mean, rng.choice(kl, size), seed=i) for i in tqdm(range(samples), leave=False)])
        low, high = ends[:, 0] > mean, ends[:, 1] < mean
        print(f"{size} prompts: covered in {1 - (low | high).mean():.0%}, the interval ends too low in {high.mean():.0%}, "
              f"begins too high in {low.mean():.0%}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
