"""A new board from 32 measured networks: a cost model of every network, then a search for it.

    python examples/03_new_board.py [ssh://pi@board]

Without an address this host is the board. The target file, its cost model and the measurements are
written to this folder; accuracy is ImageNet's, known from the packaged predictors. Run it again
after an interruption: what was measured is kept. More options go to `foxnas device calibrate`.
"""

import subprocess
import sys

import yaml

from foxnas_mlflow import Objective, fastest, load_predictors, search

device, *options = sys.argv[1:] or ["local"]
foxnas = [sys.executable, "-m", "foxnas_mlflow"]
calibrate = ["device", "calibrate", "--device", device, "--out", "board.yaml", "--image-size", "192,256", *options]
subprocess.run([*foxnas, *calibrate], check=True)

with open("board.yaml") as file:
    target = yaml.safe_load(file)
predictors = load_predictors(target["predictors"])
# No more than the measured networks bear out.
confidence = min(0.95, predictors.latency[0].stated_confidence)
low = fastest(Objective(predictors, confidence=confidence)).latency_upper_ms
print(f"{target['description']}: from {low:.3g} ms")
for latency_ms in (1.5 * low, 2 * low, 3 * low):
    outcome = search(predictors, latency_ms, confidence=confidence, evaluations=20_000)
    print(f"  within {latency_ms:.3g} ms: {outcome.accuracy:.2f} % predicted, {outcome.architecture}")
