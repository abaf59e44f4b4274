"""``foxnas main``: from images to a promoted model, step by step, each found again or done.

| step      | makes                                             | looks at                            |
|-----------|---------------------------------------------------|-------------------------------------|
| supernet  | weights for every network of the space            | data, space, preset                 |
| sample    | accuracy and latency of some networks             | supernet, device                    |
| fit       | predictors                                        | the samples                         |
| search    | the best network under the latency, with weights  | predictors, supernet, device        |
| finetune  | the same network trained alone, if epochs are given | its weights, data                 |
| quantize  | its int8 file                                     | the found network                   |
| benchmark | its latency                                       | the int8 file, device               |
| compare   | predicted and real of it and others of the front  | all of these                        |
| promote   | a stage and its alias, if the gates hold          | the int8 version and its figures    |
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from foxnas_mlflow.cli.parameters import COMPILER_IMAGE, Parameter

if TYPE_CHECKING:
    from pathlib import Path

    from foxnas_mlflow.core.targets import Target
    from foxnas_mlflow.data import ImageDataset
    from foxnas_mlflow.tracking.run import EntryRun
    from foxnas_mlflow.tracking.steps import StepResult

SUMMARY = "From images to a promoted model: supernet, sample, fit, search, quantize, benchmark, compare, promote."

PARAMETERS = (
    Parameter(
        "data", "digits", "Images: digits, fashion-mnist, or a folder (IDX, one folder a class, train/ and val/)."
    ),
    Parameter("target", "cpu", "Target: rpi4, edgetpu, cpu (this host), or the path of a target YAML."),
    Parameter(
        "device", "", "Where to measure: local, ssh://user@host, docker://image, none; empty: the target's own device."
    ),
    COMPILER_IMAGE,
    Parameter("latency_ms", "", "Latency constraint in milliseconds; empty: the middle of what is reachable.", float),
    Parameter("preset", "tiny", "Size of images and of training.", choices=("tiny", "small", "paper")),
    Parameter("space", "", "Search space: cpu, tpu, proxyless or the path of a YAML; empty: the target's."),
    Parameter("supernet", "", "Model URI of a trained supernet; empty: train one."),
    Parameter("epochs", 0, "Epochs of the supernet; 0: the preset's.", int),
    Parameter("max_train", 0, "Train on at most so many images, drawn by class; 0: all.", int),
    Parameter("n_samples", 60, "Networks to evaluate and measure for the predictors.", int),
    Parameter("n_compare", 5, "Networks of the front to hold predictions against, beside the found one.", int),
    Parameter("finetune_epochs", 0, "Epochs to train the found network alone, from its shared weights; 0: none.", int),
    Parameter("confidence", 0.95, "Probability in [0.5, 1) that a measurement meets the constraint.", float),
    Parameter("max_accuracy_drop", 1.0, "Most points of top-1 that int8 may lose for promotion.", float),
    Parameter("stage", "Staging", "Stage to promote to; none: do not promote."),
    Parameter("seed", 0, "Seed of everything that is drawn.", int),
    Parameter("name", "foxnas", "Prefix of the registered models."),
)


_STEPS = ("supernet", "sample", "fit", "search", "finetune", "quantize", "benchmark", "compare", "promote")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Do what is missing, hold predictions against reality, promote, and tell it on one page."""
    import dataclasses

    from foxnas_mlflow.core.errors import InvalidInputError
    from foxnas_mlflow.core.searchers import check_budget
    from foxnas_mlflow.core.targets import get_target
    from foxnas_mlflow.data import load_dataset

    for name in ("epochs", "max_train", "n_compare", "finetune_epochs", "seed", "max_accuracy_drop"):
        if getattr(args, name) < 0:
            raise InvalidInputError(f"{name} must be 0 or more", received=getattr(args, name))
    if args.latency_ms != "":
        check_budget(args.latency_ms, 1)
    if not 0.5 <= args.confidence < 1:
        raise InvalidInputError("confidence must be at least 0.5 and below 1", received=args.confidence)
    target = get_target(args.target)
    if target.runtime == "torch":
        raise InvalidInputError(
            "main makes int8 models: the target's runtime must be litert or edgetpu", received=target.name
        )
    if args.stage.lower() not in ("staging", "production", "none"):
        raise InvalidInputError("stage must be Staging, Production or none", received=args.stage)
    device = "" if args.device == "none" else args.device or target.device
    # Hours of training are not spent before what ends the work is known to be there.
    for module, extra, feature in (
        ("torch", "train", "training a supernet"),
        ("kornia", "train", "training a supernet"),
        ("statsmodels", "fit", "fitting predictors"),
        ("tensorflow", "tflite", "conversion to TensorFlow Lite"),
        ("ai_edge_litert", "tflite", "running an int8 model"),
    ):
        _require(module, extra, feature)
    machine = _machine(device, target, args.compiler_image) if device else ""
    dataset = load_dataset(args.data, seed=args.seed, max_train=args.max_train or None)

    from foxnas_mlflow.core.space import get_space
    from foxnas_mlflow.tracking.registry import registered_name
    from foxnas_mlflow.tracking.run import entry_run
    from foxnas_mlflow.tracking.steps import end_dead_runs

    registered_name(args.name, "tflite", target.name)
    base = get_space(args.space or target.space)
    resolved = vars(args) | {"device": device, "space": args.space or target.space}
    with entry_run(
        stage="main", params=resolved | {"latency_ms": args.latency_ms or "auto"}, target=target.name
    ) as run:
        end_dead_runs(run.experiment_id)
        common = {
            "data": dataset.digest,
            "space": base.digest,
            "target": dataclasses.asdict(target),
            "machine": machine,
        }
        return _Pipeline(args, run, target, device, dataset, common).run()


class _Pipeline:
    """The steps of one run of the pipeline.

    Attributes:
        done: What each finished step made, by name.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        run: EntryRun,
        target: Target,
        device: str,
        dataset: ImageDataset,
        common: Mapping[str, Any],
    ) -> None:
        self._args, self._run, self._target, self._device = args, run, target, device
        self._dataset, self._common = dataset, common
        self.done: dict[str, StepResult] = {}

    def run(self) -> dict[str, Any]:
        """All steps in order."""
        import time

        from foxnas_mlflow.core.errors import PromotionError
        from foxnas_mlflow.tracking.pipeline import conclude
        from foxnas_mlflow.tracking.quantize import runnable_model

        args, start = self._args, time.monotonic()
        supernet = args.supernet or self._supernet()
        samples = self._step(
            "sample",
            ("supernet",),
            resume=self._rows_to_go_on_from,
            supernet=supernet,
            data=args.data,
            device=self._device,
            n_samples=args.n_samples,
        )["measurements"]
        predictors = self._step("fit", ("sample",), measurements=samples)["model_uri"]
        latency_ms = self._latency(predictors)
        subnet = self._step(
            "search",
            ("fit", "supernet"),
            latency_ms=latency_ms,
            confidence=args.confidence,
            predictors=predictors,
            supernet=supernet,
            data=args.data,
            device=self._device,
            measurements=samples,
        )["model_uri"]
        if args.finetune_epochs:
            subnet = self._finetune(subnet)
        quantized = self._step("quantize", ("search", "finetune"), subnet=subnet, data=args.data)
        model = runnable_model(quantized)
        if self._device:
            self._step("benchmark", ("quantize",), model=model, device=self._device)
        self._compare(supernet, predictors, model, latency_ms)
        refusal: PromotionError | None = None
        if self._device and args.stage.lower() != "none":
            try:
                self._promote(model, latency_ms)
            except PromotionError as error:
                refusal = error
        outputs = conclude(
            self._run,
            self.done,
            request=vars(args) | {"device": self._device, "latency_ms": latency_ms},
            target=self._target,
            dataset=self._dataset,
            refusal=str(refusal or ""),
            seconds=time.monotonic() - start,
        )
        if refusal is not None:
            raise refusal
        return outputs

    def _step(
        self,
        name: str,
        after: Sequence[str],
        *,
        resume: Callable[[Sequence[str]], str] | None = None,
        also: Mapping[str, Any] | None = None,
        **values: Any,
    ) -> Mapping[str, Any]:
        """Find or do a step that is a command.

        Args:
            name: Name of the command.
            after: Steps whose results it depends on.
            resume: What to go on from, given the runs of this step that were cut off.
            also: Further inputs of its digest.
            values: Its parameters; those that are not given have the command's defaults.

        Returns:
            Its outputs.
        """
        import importlib

        from foxnas_mlflow.tracking.steps import Step, run_step
        from foxnas_mlflow.workflows import FitRequest, run_fit

        if name == "fit":
            own = {key: getattr(self._args, key) for key in ("name", "seed", "target")}
            fit_request = FitRequest(**own, **values)
            fit_inputs = {key: v for key, v in fit_request.values().items() if key != "target"}
            fit_after = {step: self.done[step].run_id for step in after if step in self.done}

            def fit_action(cut_off: Sequence[str]) -> Mapping[str, Any]:
                result = run_fit(fit_request)
                print(result.describe())
                return {"run_id": result.run_id, "model_uri": result.model_uri}

            self._announce(name)
            step = Step(name, {"arguments": fit_inputs, "after": fit_after, **self._common})
            self._finish(run_step(self._run, step, fit_action))
            return self.done[name].outputs
        module = importlib.import_module(f"foxnas_mlflow.cli.commands.{name}")
        own = {key: getattr(self._args, key) for key in ("name", "seed", "target", "compiler_image")}
        known = {p.name: p.parse(str(p.default)) for p in module.PARAMETERS}
        arguments = known | {key: value for key, value in own.items() if key in known} | values
        # Data and target count by their content, wherever they are; what is resumed changes no result.
        inputs = {key: value for key, value in arguments.items() if key not in ("data", "target", "resume")}
        before = {step: self.done[step].run_id for step in after if step in self.done}

        def action(cut_off: Sequence[str]) -> Mapping[str, Any]:
            going_on = {} if resume is None else {"resume": resume(cut_off)}
            outputs: Mapping[str, Any] = module.run(argparse.Namespace(**arguments | going_on))
            return outputs

        self._announce(name)
        step = Step(name, {"arguments": inputs, "after": before, **self._common, **(also or {})})
        self._finish(run_step(self._run, step, action))
        return self.done[name].outputs

    def _announce(self, name: str) -> None:
        print(f"\n== {name} ({_STEPS.index(name) + 1} of {len(_STEPS)})", flush=True)

    def _finish(self, result: StepResult) -> None:
        self.done[result.name] = result
        how = "found, its inputs are unchanged" if result.reused else f"done in {result.seconds:.0f} s"
        print(f"== {result.name}: {how}; run {result.run_id}", flush=True)

    def _supernet(self) -> str:
        from foxnas_mlflow.tracking.supernet import has_checkpoint

        args = self._args
        outputs = self._step(
            "supernet",
            (),
            # The newest checkpoint: that of a resumed training is further than the one it came from.
            resume=lambda cut_off: next((run_id for run_id in cut_off if has_checkpoint(run_id)), ""),
            data=args.data,
            space=args.space or self._target.space,
            preset=args.preset,
            epochs=args.epochs,
            max_train=args.max_train,
        )
        return str(outputs["model_uri"])

    def _rows_to_go_on_from(self, cut_off: Sequence[str]) -> str:
        """The run whose rows this host's cache does not have: of another host, or all but finished."""
        import tempfile
        from pathlib import Path

        from mlflow import MlflowClient

        from foxnas_mlflow.tracking.inputs import MEASUREMENTS, open_measurements
        from foxnas_mlflow.tracking.process import PROCESS_TAG, is_here

        client = MlflowClient()
        for run_id in cut_off:
            if all(file.path != MEASUREMENTS for file in client.list_artifacts(run_id)):
                continue
            with tempfile.TemporaryDirectory(prefix="foxnas-") as directory:
                rows, _ = open_measurements(f"runs:/{run_id}/{MEASUREMENTS}", Path(directory))
            here = is_here(client.get_run(run_id).data.tags.get(PROCESS_TAG, ""))
            if not here or len(rows) >= self._args.n_samples:
                return run_id
        return ""

    def _latency(self, predictors_uri: str) -> float:
        """The constraint: the one asked for, or the middle between the fastest and the most accurate network."""
        import math

        from foxnas_mlflow.core.searchers import Objective, fastest, front_of
        from foxnas_mlflow.tracking.inputs import open_predictors

        if self._args.latency_ms != "":
            return float(self._args.latency_ms)
        predictors, _ = open_predictors(predictors_uri, self._target.name)
        objective = Objective(predictors, confidence=self._args.confidence)
        front = front_of(objective)
        low = fastest(objective).latency_upper_ms
        high = predictors.latency_bound_ms(front.architecture(len(front) - 1), self._args.confidence)
        middle = math.sqrt(low * high)
        latency_ms = max(float(f"{middle:.3g}"), low)
        print(
            f"\nlatency_ms is not given: {latency_ms:g} ms is taken, the (geometric) middle between the fastest "
            f"network, at most {low:.3g} ms, and the most accurate one, at most {high:.3g} ms."
        )
        return latency_ms

    def _finetune(self, subnet_uri: str) -> str:
        """Train the found network alone; the URI of the better one of the two."""
        import shutil

        from foxnas_mlflow.core.files import cache_directory
        from foxnas_mlflow.tracking.steps import Step, run_step

        args = self._args
        inputs = {
            "subnet": subnet_uri,
            "after": {"search": self.done["search"].run_id},
            "epochs": args.finetune_epochs,
            "preset": args.preset,
            "max_train": args.max_train,
            "seed": args.seed,
            **self._common,
        }
        self._announce("finetune")
        step = Step("finetune", inputs)
        directory = cache_directory("finetunes", step.digest[:32])
        checkpoint = directory / "checkpoint.safetensors"
        self._finish(run_step(self._run, step, lambda cut_off: self._finetuned(subnet_uri, checkpoint)))
        # Only now that the step is known as done.
        shutil.rmtree(directory)
        outputs = self.done["finetune"].outputs
        return str(outputs["model_uri"]) if outputs["finetuned_top1"] > outputs["inherited_top1"] else subnet_uri

    def _finetuned(self, subnet_uri: str, checkpoint: Path) -> Mapping[str, Any]:
        from foxnas_mlflow.cli.progress import progress_bar
        from foxnas_mlflow.supernet import get_preset
        from foxnas_mlflow.tracking.finetune import finetuned
        from foxnas_mlflow.tracking.run import entry_run

        args = self._args
        params = {"subnet": subnet_uri, "epochs": args.finetune_epochs, "data": args.data}
        with (
            entry_run(stage="finetune", params=params, target=self._target.name) as run,
            progress_bar("finetune", "step") as show,
        ):
            return finetuned(
                run,
                subnet_uri,
                self._dataset,
                preset=get_preset(args.preset),
                epochs=args.finetune_epochs,
                seed=args.seed,
                progress=lambda done, total, loss: show(done, total, f"loss {loss:.3f}"),
                checkpoint=checkpoint,
            )

    def _compare(self, supernet: str, predictors_uri: str, model: str, latency_ms: float) -> None:
        import shutil

        from foxnas_mlflow.core.files import cache_directory
        from foxnas_mlflow.tracking.steps import Step, run_step

        args = self._args
        after = [name for name in ("supernet", "fit", "quantize") if name in self.done]
        inputs = {
            "supernet": supernet,
            "n_compare": args.n_compare,
            "confidence": args.confidence,
            "latency_ms": latency_ms,
            "seed": args.seed,
            "after": {name: self.done[name].run_id for name in after},
            **self._common,
        }
        step = Step("compare", inputs)
        directory = cache_directory("comparisons", step.digest[:32])
        self._announce("compare")

        def action(cut_off: Sequence[str]) -> Mapping[str, Any]:
            return self._compared(supernet, predictors_uri, model, latency_ms, directory)

        self._finish(run_step(self._run, step, action))
        # Only now that the step is known as done.
        shutil.rmtree(directory)

    def _compared(
        self, supernet_uri: str, predictors_uri: str, model_uri: str, latency_ms: float, directory: Path
    ) -> Mapping[str, Any]:
        from foxnas_mlflow.cli.progress import progress_bar
        from foxnas_mlflow.core.comparison import spread_over
        from foxnas_mlflow.core.files import worked_on
        from foxnas_mlflow.core.searchers import Objective, front_of
        from foxnas_mlflow.tracking.comparison import compare, find_found, log_comparison
        from foxnas_mlflow.tracking.inputs import open_predictors, open_supernet
        from foxnas_mlflow.tracking.run import entry_run

        args = self._args
        params = {"model": model_uri, "predictors": predictors_uri, "supernet": supernet_uri, "latency_ms": latency_ms}
        with (
            entry_run(stage="compare", params=params, target=self._target.name) as run,
            worked_on(directory / "lock", "the same comparison"),
            progress_bar("compare", "network") as show,
        ):
            supernet = open_supernet(supernet_uri, data=args.data, name=args.name)
            predictors, _ = open_predictors(predictors_uri, self._target.name)
            found = find_found(model_uri, run.directory)
            front = front_of(Objective(predictors, confidence=args.confidence))
            rows = compare(
                found,
                spread_over(front, args.n_compare, without=found.architecture),
                supernet=supernet,
                predictors=predictors,
                confidence=args.confidence,
                target=self._target,
                device=self._device,
                compiler_image=args.compiler_image,
                seed=args.seed,
                directory=directory,
                on_row=lambda done, total: show(done, total, ""),
            )
            return log_comparison(run, rows, latency_ms)

    def _promote(self, model: str, latency_ms: float) -> None:
        """Ask the gates, unless they let this very version through and it still is where they put it."""
        from foxnas_mlflow.tracking.registry import holds_stage

        stages = {self._args.stage, "Production"}
        # What somebody else moved since then is moved again: no earlier step counts for this one.
        again = {} if any(holds_stage(model, stage) for stage in stages) else {"in": self._run.run_id}
        after = [name for name in ("quantize", "benchmark") if name in self.done]
        self._step(
            "promote",
            after,
            also=again,
            model=model,
            stage=self._args.stage,
            max_latency_ms=latency_ms,
            max_accuracy_drop=self._args.max_accuracy_drop,
        )


def _require(module: str, extra: str, feature: str) -> None:
    """Refuse at once what a later step would miss; importing it can wait until then."""
    import importlib.util

    from foxnas_mlflow.core.errors import import_or_raise

    if importlib.util.find_spec(module) is None:
        import_or_raise(module, extra=extra, feature=feature)


def _machine(device: str, target: Target, compiler_image: str) -> str:
    """The machine behind an address, which must be ready to measure for the target.

    Raises:
        DeviceError: If it does not answer, or lacks something; without the compiler that its Edge TPU needs.
    """
    from foxnas_mlflow.core.errors import DeviceError
    from foxnas_mlflow.devices import check, connect
    from foxnas_mlflow.tflite import require_compiler

    if target.runtime == "edgetpu":
        require_compiler(compiler_image)

    with connect(device) as connection:
        found = check(connection)
    if not found.ready:
        raise DeviceError("a device must have what measuring needs", received=f"{device} lacks {found.missing[0]}")
    if target.runtime == "edgetpu" and not found.edgetpu:
        raise DeviceError(
            f"the target {target.name} is measured on an Edge TPU",
            received=f"none that answers on {device}",
            remedy="plug it in and install libedgetpu1-std there, or give --device none for the cost model",
        )
    return found.device
