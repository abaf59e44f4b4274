"""Estimate: what Arm's compiler says of an int8 model on an Ethos-U."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.workflows._request import Request, parameter
from foxnas_mlflow.workflows._workflow import Result, Workflow


@dataclass(frozen=True, kw_only=True)
class EstimateRequest(Request):
    """What to estimate; see `run_estimate`."""

    model: str = parameter("", "Path of an int8 .tflite file, or models:/NAME/VERSION.")
    target: str = parameter(
        "ethos-u65-256", "Accelerator: ethos-u55-32 to -256, ethos-u65-256, -512, ethos-u85-128 to -2048."
    )
    system_config: str = parameter("", "System configuration of Arm's vela.ini; empty: a usual one of the accelerator.")
    memory_mode: str = parameter("", "Memory mode of Arm's vela.ini; empty: a usual one of the accelerator.")

    def check(self) -> None:
        """A model must be named."""
        if not self.model:
            raise InvalidInputError(
                "model must be an int8 .tflite file or a registered model", remedy="give --model, from foxnas quantize"
            )


@dataclass(frozen=True, kw_only=True)
class EstimateResult(Result):
    """An estimate; nothing was measured.

    Attributes:
        latency_ms: As the compiler estimates it.
    """

    latency_ms: float


def run_estimate(request: EstimateRequest, *, tags: Mapping[str, str] | None = None) -> EstimateResult:
    """Compile a model for an Ethos-U and log what the compiler says as an estimate.

    Args:
        request: What to estimate.
        tags: Further tags of its run.

    Raises:
        InvalidInputError: If there is no such model.
        DeviceError: If Vela is missing or refuses the model.
    """
    import tempfile
    from pathlib import Path

    from foxnas_mlflow.devices import estimate_latency_vela
    from foxnas_mlflow.tracking.benchmark import find_model, log_estimate
    from foxnas_mlflow.tracking.run import entry_run

    with tempfile.TemporaryDirectory(prefix="foxnas-") as directory:
        model = find_model(request.model, Path(directory))
        # What Vela refuses leaves no run behind.
        estimate = estimate_latency_vela(
            model.path, request.target, system_config=request.system_config, memory_mode=request.memory_mode
        )
        with entry_run(
            stage="estimate",
            params=request.texts() | {"model": model.source},
            target=request.target,
            latency_source="cost_model",
            tags=tags,
        ) as run:
            log_estimate(run, estimate, model)
    rows = (
        ("model", model.source),
        ("accelerator", f"{estimate.accelerator} ({estimate.system_config}, {estimate.memory_mode})"),
        ("operators", f"{estimate.operators_npu} on the accelerator, {estimate.operators_cpu} on the processor"),
        ("latency", f"{estimate.latency_ms:.3f} ms estimated by Vela {estimate.version}, not measured"),
        ("memory", f"{estimate.sram_bytes / 2**10:.0f} KiB SRAM, {estimate.dram_bytes / 2**10:.0f} KiB DRAM"),
        ("run", f"{run.run_id}: vela.json, vela_layers.csv, model_vela.tflite"),
    )
    lines = [
        f"Estimated for {request.target}:",
        *(f"  {key:<14}{text}" for key, text in rows),
        "Next: mlflow ui, and compare the run with those of other networks.",
    ]
    return EstimateResult(run_id=run.run_id, latency_ms=estimate.latency_ms, summary="\n".join(lines))


WORKFLOW = Workflow(
    "estimate",
    "Estimate an int8 model on an Arm Ethos-U with the vendor's compiler Vela; nothing is measured.",
    EstimateRequest,
    run_estimate,
)
