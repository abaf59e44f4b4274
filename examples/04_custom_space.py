"""A search space of one's own: read it, count it, cost it before anything is trained.

    python examples/04_custom_space.py [SPACE.yaml]

The latencies come from the packaged cost model of the Raspberry Pi 4, which knows any network that
is made of these operators. The whole method in this space:

    foxnas main --space examples/04_custom_space.yaml
"""

import sys
from pathlib import Path

import numpy as np

from foxnas_mlflow import SearchSpace, build_network, get_target, network_cost, reference_latency

path = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".yaml")
space = SearchSpace.from_yaml(path)
latency = reference_latency(get_target("rpi4"), space)
print(f"{space.name}: {space.n_architectures:.3g} networks at {list(space.image_sizes)} px")
print(f"{'network':<10}{'px':>4}{'parameters':>12}{'MACs':>12}{'rpi4 ms':>9}")
drawn = space.sample(np.random.default_rng(0), n=3)
for name, architecture in (
    ("smallest", space.smallest()),
    ("largest", space.largest()),
    *(("random", a) for a in drawn),
):
    cost = network_cost(build_network(space, architecture))
    milliseconds = latency.of("latency_ms", architecture.image_size).predict([architecture])[0]
    print(f"{name:<10}{architecture.image_size:>4}{cost.params:>12,.0f}{cost.macs:>12,.0f}{milliseconds:>9.2f}")
