# %% [markdown]
# # FOX-NAS from Python
# Cells of a notebook (Jupyter and editors read `# %%`); `python examples/05_python_api.py` runs them all.

# %% A network is a value: an image size and blocks, with JSON.
from foxnas_mlflow import (
    Architecture,
    build_network,
    exact_front,
    marginal_effects,
    network_cost,
    rank_edits,
    reference_predictors,
    search,
)

predictors = reference_predictors("rpi4")
space = predictors.space
smallest = space.smallest(256)
assert Architecture.from_json(smallest.to_json()) == smallest
print(smallest, f"{network_cost(build_network(space, smallest)).macs / 1e6:.0f} M multiply-accumulates")

# %% Predictions have intervals.
table = predictors.predict_table([smallest, space.largest(256)], confidence=0.9)
for i, name in enumerate(("smallest", "largest")):
    print(
        f"{name}: {table['accuracy'][i]:.1f} % ({table['accuracy_lower'][i]:.1f} to {table['accuracy_upper'][i]:.1f}), "
        f"{table['latency_ms'][i]:.0f} ms ({table['latency_ms_lower'][i]:.0f} to {table['latency_ms_upper'][i]:.0f})"
    )

# %% They can be read: what an edit of a middle network changes.
for effect in marginal_effects(predictors.of("latency_ms", 256))[:3]:
    print(f"{effect.label}: {effect.delta:+.2f} ms")

# %% The best network under a latency, with the proof that there is no better one.
outcome = search(predictors, latency_ms=60, evaluations=50_000)
print(outcome.architecture)
print(f"{outcome.accuracy:.2f} % at {outcome.latency_ms:.1f} ms, at most {outcome.latency_upper_ms:.1f} ms")
print(outcome.certificate()["statement"])

# %% Every network that no other beats, and the cheapest edits of the found one.
front = exact_front(predictors)
print(f"{len(front)} networks from {front.latency_ms[0]:.0f} ms to {front.latency_ms[-1]:.0f} ms")
for edit in rank_edits(predictors, outcome.architecture)[:3]:
    print(f"{edit.description}: {edit.delta_latency_ms:+.2f} ms, {edit.delta_accuracy:+.3f} points")
