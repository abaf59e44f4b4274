"""``foxnas estimate``: what Arm's compiler says of an int8 model on an Ethos-U."""

from __future__ import annotations

import argparse

from foxnas_mlflow.cli.parameters import Parameter

SUMMARY = "Estimate an int8 model on an Arm Ethos-U with the vendor's compiler Vela; nothing is measured."

PARAMETERS = (
    Parameter("model", "", "Path of an int8 .tflite file, or models:/NAME/VERSION."),
    Parameter(
        "target", "ethos-u65-256", "Accelerator: ethos-u55-32 to -256, ethos-u65-256, -512, ethos-u85-128 to -2048."
    ),
    Parameter("system_config", "", "System configuration of Arm's vela.ini; empty: a usual one of the accelerator."),
    Parameter("memory_mode", "", "Memory mode of Arm's vela.ini; empty: a usual one of the accelerator."),
)


def run(args: argparse.Namespace) -> dict[str, str | float]:
    """Compile, log what the compiler says as an estimate, and print it.

    Returns:
        run_id, and latency_ms as estimated.
    """
    import tempfile
    from pathlib import Path

    from foxnas_mlflow.core.errors import InvalidInputError
    from foxnas_mlflow.devices import estimate_latency_vela

    if not args.model:
        raise InvalidInputError(
            "model must be an int8 .tflite file or a registered model", remedy="give --model, from foxnas quantize"
        )

    from foxnas_mlflow.tracking.benchmark import find_model, log_estimate
    from foxnas_mlflow.tracking.run import entry_run

    with tempfile.TemporaryDirectory(prefix="foxnas-") as directory:
        model = find_model(args.model, Path(directory))
        # What Vela refuses leaves no run behind.
        estimate = estimate_latency_vela(
            model.path, args.target, system_config=args.system_config, memory_mode=args.memory_mode
        )
        with entry_run(
            stage="estimate",
            params=vars(args) | {"model": model.source},
            target=args.target,
            latency_source="cost_model",
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
    print(f"Estimated for {args.target}:")
    print("\n".join(f"  {key:<14}{text}" for key, text in rows))
    print("Next: mlflow ui, and compare the run with those of other networks.")
    return {"run_id": run.run_id, "latency_ms": estimate.latency_ms}
