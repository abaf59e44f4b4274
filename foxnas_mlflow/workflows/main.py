"""Main: from images to a promoted model, step by step, each found again or done.

| step      | makes                                             | looks at                            |
|-----------|---------------------------------------------------|-------------------------------------|
| supernet  | weights for every network of the space            | data, space, preset                 |
| sample    | accuracy and latency of some networks             | supernet, device                    |
| fit       | predictors                                        | the samples                         |
| search    | the best network under the limits, with weights   | predictors, supernet, device        |
| finetune  | the same network trained alone, if epochs are given | its weights, data                 |
| quantize  | its int8 file                                     | the found network                   |
| benchmark | its latency                                       | the int8 file, device               |
| compare   | predicted and real of it and others of the front  | all of these, the samples           |
| promote   | a stage and its alias, if the gates hold          | the int8 version and its figures    |
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.workflows._addresses import addresses, where_measured
from foxnas_mlflow.workflows._executor import WORKING, ExecutorRequest, open_executor
from foxnas_mlflow.workflows._goal import GoalRequest
from foxnas_mlflow.workflows._images import find_unknown
from foxnas_mlflow.workflows._request import (
    Request,
    chosen_device,
    compiler_image,
    energy_parameter,
    parameter,
    sustained_parameter,
)
from foxnas_mlflow.workflows._training import TrainingRequest
from foxnas_mlflow.workflows._workflow import Result, Workflow, logger
from foxnas_mlflow.workflows.benchmark import BenchmarkRequest, BenchmarkResult, run_benchmark
from foxnas_mlflow.workflows.compare import CompareRequest, CompareResult, run_compare
from foxnas_mlflow.workflows.finetune import FinetuneRequest, FinetuneResult, run_finetune
from foxnas_mlflow.workflows.fit import FitRequest, FitStepResult, run_fit
from foxnas_mlflow.workflows.promote import PromoteRequest, PromoteResult, run_promote
from foxnas_mlflow.workflows.quantize import QuantizeRequest, QuantizeResult, run_quantize
from foxnas_mlflow.workflows.sample import ENERGY, SampleRequest, SampleResult, run_sample
from foxnas_mlflow.workflows.search import SearchRequest, SearchResult, run_search
from foxnas_mlflow.workflows.supernet import SupernetRequest, SupernetResult, run_supernet

if TYPE_CHECKING:
    from pathlib import Path

    from foxnas_mlflow.core.architecture import Architecture
    from foxnas_mlflow.core.space import SearchSpace
    from foxnas_mlflow.core.targets import Target
    from foxnas_mlflow.core.workers import Executor
    from foxnas_mlflow.data import ImageDataset
    from foxnas_mlflow.tracking.pipeline import PipelineNetwork
    from foxnas_mlflow.tracking.run import EntryRun
    from foxnas_mlflow.tracking.steps import Step, StepResult


@dataclass(frozen=True, kw_only=True)
class MainRequest(GoalRequest, TrainingRequest, ExecutorRequest):
    """From which images to which model; see `run_main`."""

    target: str = parameter("cpu", "Target: rpi4, edgetpu, cpu (this host), or the path of a target YAML.")
    device: str = parameter(
        "",
        "Where to measure: local, ssh://user@host, docker://image, or several boards of one kind, comma separated; "
        "empty: the target's own device; none: nowhere.",
    )
    compiler_image: str = compiler_image()
    latency_ms: tuple[float, ...] = parameter(
        (),
        "Latency limit in milliseconds, or several: a network each, the first goes on to promotion; empty: the middle "
        "of what is reachable, where nothing else is asked; promotion then asks for no latency.",
        above=0,
    )
    space: str = parameter("", "Search space: cpu, tpu, proxyless, lite or the path of a YAML; empty: the target's.")
    supernet: str = parameter("", "Model URI of a trained supernet; empty: train one.")
    n_samples: int = parameter(55, "Networks to evaluate and measure for the predictors.", at_least=1)
    energy: str = energy_parameter("Measure energy too, of samples 20 s a network, for limits on energy_mj")
    sustained_seconds: float = sustained_parameter()
    rounds: int = parameter(
        2, "Most rounds of searching, looking at networks of the front and refitting; 1: no refit.", at_least=1
    )
    n_compare: int = parameter(
        5, "Networks of the front to hold predictions against, beside the found one.", at_least=0
    )
    finetune_epochs: int = parameter(
        0, "Epochs to train the found network alone, from its shared weights; 0: none.", at_least=0
    )
    confidence: float = parameter(
        0.95, "Probability in [0.5, 1) that measurements meet all limits together.", at_least=0.5, below=1
    )
    max_accuracy_drop: float = parameter(
        1.0, "Most points of top-1 that int8 may lose, for promotion and before it is repaired.", at_least=0
    )
    repair_epochs: int = parameter(
        3, "Epochs of training with simulated int8 where it loses more than that; 0: none.", at_least=0
    )
    max_false_accept: float = parameter(
        0.05, "Share of images of none of the classes that may be answered with a class.", above=0, below=1
    )
    unknown: str = parameter("", "Folder of images of none of the classes; empty: wrong answers stand for them.")
    stage: str = parameter("Staging", "Stage to promote to; none: do not promote.")
    seed: int = parameter(0, "Seed of everything that is drawn.", at_least=0)
    name: str = parameter("foxnas", "Prefix of the registered models.")

    def check(self) -> None:
        """The stage is one, or none; a trained supernet stays as it is; what is limited, and the goal, can be known."""
        from foxnas_mlflow.core.searchers import KNEE, check_quantity, parse_limits

        super().check()
        asked = [limit.quantity for limit in parse_limits(self.limits)]
        for quantity in (*asked, *([] if self.objective in ("accuracy", KNEE) else [self.objective])):
            if quantity == ENERGY and not self.energy:
                raise InvalidInputError(
                    "energy is limited where it is measured",
                    received=f"{quantity} without energy",
                    remedy="give --energy auto, or a command on the device that prints watts",
                )
            # What it fits predictors of, beside accuracy.
            check_quantity(
                quantity,
                ("latency_ms", ENERGY),
                remedy="choose one of these; one of your own is searched with foxnas fit and search",
            )
        if self.stage.lower() not in ("staging", "production", "none"):
            raise InvalidInputError("stage must be Staging, Production or none", received=self.stage)
        # What is trained further takes these two from here.
        training = {p.name for p in TrainingRequest.parameters()} - {"data"}
        training -= {"preset", "max_train"} if self.finetune_epochs else set()
        if self.supernet and (given := self.options(*training)):
            raise InvalidInputError(
                "how to train is of a training, and supernet names a trained one",
                received=given.strip(),
                remedy="leave one of the two out",
            )


@dataclass(frozen=True, kw_only=True)
class MainResult(Result):
    """A finished pipeline.

    Attributes:
        model_uri: The int8 model that runs on the target.
        metrics: Figures of the pipeline, as logged.
    """

    model_uri: str
    metrics: Mapping[str, float]


STEPS = ("supernet", "sample", "fit", "search", "finetune", "quantize", "benchmark", "compare", "promote")

_NEEDS = (
    ("torch", "train", "training a supernet"),
    ("statsmodels", "fit", "fitting predictors"),
    ("tensorflow", "tflite", "conversion to TensorFlow Lite"),
    ("ai_edge_litert", "tflite", "running an int8 model"),
)
"""Module, the extra that brings it, and what it is for."""

_SEARCHED_AGAIN = 3
"""How often the search is done again because the comparison shows a better network."""

_LOOKS = 3
"""Networks of the front that a round looks at. Of five one more often truly beats the chosen one, which is no better
(``benchmarks/verification.py``)."""

_MODELS = ("supernet", "init", "teacher")
"""Parameters that may name a registered model."""

_MOVABLE = ("data", "target", "space", "resume", "signing_key", *WORKING)
"""Parameters that are no inputs of a step: data, target and space count apart from them, what is resumed and who works
or signs change nothing."""


def run_main(request: MainRequest) -> MainResult:
    """Do what is missing, hold predictions against reality, promote, and tell it on one page.

    Args:
        request: From which images to which model.

    Raises:
        InvalidInputError: Before any work, if something that a later step needs is missing or wrong.
        PromotionError: At the end, if a gate refuses; everything else is done and kept.
    """
    import functools

    from foxnas_mlflow.core.options import check_options
    from foxnas_mlflow.core.predictors import reference_latency
    from foxnas_mlflow.core.space import get_space
    from foxnas_mlflow.core.targets import get_target
    from foxnas_mlflow.data import earlier_digests, load_dataset
    from foxnas_mlflow.workflows._timers import target_content

    target = get_target(request.target)
    target.int8_runtime("main")
    device = chosen_device(request.device, target.device)
    if not device and (request.energy or request.sustained_seconds):
        raise InvalidInputError(
            "energy and a load that lasts are measured on a device",
            received=f"energy={request.energy!r}, sustained_seconds={request.sustained_seconds:g} without one",
            remedy="say where to measure: --device ssh://user@host",
        )
    # Hours of training are not spent before what ends the work is known to be there.
    for needed in _NEEDS:
        _require(*needed)
    if request.unknown:
        find_unknown(request.unknown)

    from foxnas_mlflow.supernet import get_preset

    space = get_space(request.space or target.space)
    if request.supernet:
        from foxnas_mlflow.tracking.inputs import open_supernet

        supernet = open_supernet(request.supernet, data=request.data)
        # An alias may mean another version a moment later.
        request = request.replace(supernet=supernet.uri)
        searched = supernet.space
    else:
        preset = get_preset(request.preset)
        searched = preset.space(space, in_channels=space.in_channels, n_classes=space.n_classes)
    check_options(searched)
    _check_samples(request.n_samples, searched, measured=bool(device))
    with open_executor(request) as executor:
        if not device:
            reference_latency(target, searched)  # refuses a target without a cost model
        machine = _machine(device, target, searched, request.compiler_image, request.energy, executor)
    read = functools.partial(
        load_dataset,
        request.data,
        seed=request.seed,
        max_train=request.max_train or None,
        sizes=searched.image_sizes,
        keep=True,
        background=request.background,
    )
    dataset = supernet.dataset if request.supernet else read()

    from foxnas_mlflow.tracking.claims import heartbeat
    from foxnas_mlflow.tracking.registry import check_rights, fixed_uri, named_latest, registered_name
    from foxnas_mlflow.tracking.run import entry_run

    kinds = ["predictors", "subnet", "tflite"]
    kinds += [] if request.supernet else ["supernet"]
    kinds += ["edgetpu"] if target.runtime == "edgetpu" and device else []
    registered = {registered_name(request.name, kind, target.name): kind for kind in kinds}
    # An alias or "latest" may mean another version when the same command goes on.
    given = {"init": request.init, "teacher": request.teacher}
    own = registered_name(request.name, "supernet")
    # But what this training registers is the next "latest": it would begin again from each.
    models = {key: uri if named_latest(uri, own) else fixed_uri(uri) for key, uri in given.items()}
    request = request.replace(space=request.space or target.space, **models)
    params = request.texts() | {"device": device, "objective": request.goal}
    if request.is_open:
        params["latency_ms"] = "auto"
    with entry_run(stage="main", params=params, target=target.name) as run:
        common = {
            "data": dataset.digest,
            "space": get_space(request.space).digest,
            "target": target_content(target, space, device),
            "machine": machine,
        }
        pipeline = _Pipeline(request, run, target, device, dataset, common)
        if not request.supernet and not pipeline.is_begun():
            for digest in filter(None, (dataset.earlier_digest, *earlier_digests(dataset.source, dataset.digest))):
                earlier = _Pipeline(request, run, target, device, read(digest=digest), common | {"data": digest})
                if earlier.is_begun():
                    pipeline = earlier
                    break
        with heartbeat(run.run_id):
            run.log_json(params, "request.json")
            check_rights(run, registered)
            return pipeline.run()


_Do = Callable[[Sequence[str], Mapping[str, str]], Result]
"""Does a step, given the runs of it that were cut off and further tags of its run."""

S = TypeVar("S", bound=Result)


class _Pipeline:
    """The steps of one run of the pipeline.

    Attributes:
        done: What each finished step made, by name.
    """

    def __init__(
        self,
        request: MainRequest,
        run: EntryRun,
        target: Target,
        device: str,
        dataset: ImageDataset,
        common: Mapping[str, Any],
    ) -> None:
        self._request, self._run, self._target, self._device = request, run, target, device
        self._dataset, self._common = dataset, common
        self.done: dict[str, StepResult] = {}

    @property
    def _working(self) -> dict[str, Any]:
        """Who works, as the steps are told."""
        return {key: getattr(self._request, key) for key in WORKING}

    def run(self) -> MainResult:
        """All steps in order."""
        import time

        from foxnas_mlflow.core.errors import PromotionError
        from foxnas_mlflow.tracking.pipeline import conclude

        request, start = self._request, time.monotonic()
        supernet = request.supernet or self._supernet().model_uri
        samples = self._sample(supernet).measurements
        predictors = self._fit(samples).model_uri
        found, networks, compared = self._found(predictors, supernet, samples)
        model, latency_ms = networks[0].model_uri, found.latency_ms
        refusal: PromotionError | None = None
        if compared.beaten_by[0] is not None and request.stage.lower() != "none":
            refusal = PromotionError("a network that another one beats is not promoted", received=compared.checks[0])
        elif self._device and request.stage.lower() != "none":
            try:
                self._promote(model)
            except PromotionError as error:
                refusal = error
        metrics, summary = conclude(
            self._run,
            self.done,
            request=request.values() | {"device": self._device},
            latency_ms=latency_ms,
            limits=found.limits,
            confidence=request.confidence,
            networks=networks,
            target=self._target,
            dataset=self._dataset,
            refusal=str(refusal or ""),
            seconds=time.monotonic() - start,
        )
        result = MainResult(run_id=self._run.run_id, model_uri=model, metrics=metrics, summary=summary)
        if refusal is not None:
            logger.info(result.describe())
            raise refusal
        return result

    def _found(
        self, predictors: str, supernet: str, samples: str
    ) -> tuple[SearchResult, list[PipelineNetwork], CompareResult]:
        """Search, make int8 models, measure and compare them; again while the comparison shows better networks.

        Returns:
            The search, the network of each latency with its int8 model, and their comparison.
        """
        from foxnas_mlflow.core.architecture import Architecture
        from foxnas_mlflow.tracking.pipeline import PipelineNetwork

        latencies = self._latencies(predictors)
        also: list[Architecture] = []
        beaten: list[Architecture] = []
        aside: list[Architecture] = []
        for again in range(_SEARCHED_AGAIN + 1):
            found = self._search(latencies, predictors, supernet, samples, also, beaten + aside)
            networks = []
            for number, subnet in enumerate(found.model_uris):
                place = "" if number == 0 else f".{number + 1}"
                if self._request.finetune_epochs:
                    subnet = self._finetune(subnet, place).better_uri
                model = self._quantize(subnet, place).runnable_uri
                if self._device:
                    self._benchmark(model, place)
                limit = latencies[number] if len(latencies) > 1 else found.latency_ms
                networks.append(PipelineNetwork(place, limit, model))
            compared = self._compare(supernet, samples, [network.model_uri for network in networks], found)
            others = compared.better if again == 0 and compared.better else compared.beaten_by
            better = [(k, Architecture.from_dict(other)) for k, other in enumerate(others) if other]
            if not better or again == _SEARCHED_AGAIN:
                break
            chosen = [Architecture.from_dict(one) for one in found.architectures or [found.architecture]]
            also += [other for _, other in better if other not in also]
            beaten += [chosen[k] for k, _ in better if compared.beaten_by[k]]
            # What only chance may have made better is worth one more search, after which the found network may return.
            aside = [chosen[k] for k, _ in better if not compared.beaten_by[k]]
            which = "that another one beats" if not aside else "beside which a faster one is no less accurate"
            logger.info("\nThe comparison is a look too: the search is done again without a network %s.", which)
        return found, networks, compared

    def is_begun(self) -> bool:
        """Whether its supernet was trained, or its training begun."""
        from foxnas_mlflow.tracking.steps import was_begun

        _, inputs = self._training()
        return was_begun(self._run, self._identity("supernet", inputs, ()))

    def _training(self) -> tuple[SupernetRequest, dict[str, Any]]:
        """The training of the supernet, and what its result depends on."""
        main = self._request
        asked = {p.name: getattr(main, p.name) for p in TrainingRequest.parameters()}
        request = SupernetRequest(space=main.space, seed=main.seed, name=main.name, **asked)
        return request, _inputs(request)

    def _supernet(self) -> SupernetResult:
        from foxnas_mlflow.tracking.supernet import has_checkpoint

        request, inputs = self._training()

        def do(cut_off: Sequence[str], tags: Mapping[str, str]) -> Result:
            # The newest checkpoint: that of a resumed training is further than the one it came from.
            resume = next((run_id for run_id in cut_off if has_checkpoint(run_id)), "")
            changes = {"resume": resume, "init": ""} if resume else {}
            return run_supernet(request.replace(**changes), tags=tags)

        return self._step("supernet", SupernetResult, inputs, (), do)

    def _sample(self, supernet: str) -> SampleResult:
        main = self._request
        request = SampleRequest(
            supernet=supernet,
            data=main.data,
            target=main.target,
            device=self._device,
            compiler_image=main.compiler_image,
            n_samples=main.n_samples,
            energy=main.energy,
            **self._working,
            seed=main.seed,
            name=main.name,
        )
        inputs = _inputs(request)
        if not main.energy:
            # As releases asked that could not measure it.
            del inputs["energy"]

        def do(cut_off: Sequence[str], tags: Mapping[str, str]) -> Result:
            resume = _rows_to_go_on_from(cut_off, main.n_samples)
            return run_sample(request.replace(resume=resume), tags=tags)

        return self._step("sample", SampleResult, inputs, ("supernet",), do)

    def _fit(self, measurements: str) -> FitStepResult:
        main = self._request
        request = FitRequest(measurements=measurements, target=main.target, seed=main.seed, name=main.name)
        return self._step(
            "fit", FitStepResult, _inputs(request), ("sample",), lambda _, tags: run_fit(request, tags=tags)
        )

    def _latencies(self, predictors_uri: str) -> tuple[float, ...]:
        """The latency limits: those asked for, or the middle between the fastest and the most accurate network."""
        import math

        from foxnas_mlflow.core.searchers import Objective, fastest, front_of
        from foxnas_mlflow.tracking.inputs import open_predictors

        if not self._request.is_open:
            return self._request.latency_ms
        predictors, _ = open_predictors(predictors_uri, self._target.name)
        objective = Objective(predictors, confidence=self._request.confidence)
        front = front_of(objective)
        low = fastest(objective).latency_upper_ms
        high = predictors.latency_bound_ms(front.architecture(len(front) - 1), self._request.confidence)
        latency_ms = max(float(f"{math.sqrt(low * high):.3g}"), low)
        logger.info(
            "\nlatency_ms is not given: %g ms is taken, the (geometric) middle between the fastest "
            "network, at most %.3g ms, and the most accurate one, at most %.3g ms.",
            *(latency_ms, low, high),
        )
        return (latency_ms,)

    def _search(
        self,
        latencies_ms: tuple[float, ...],
        predictors: str,
        supernet: str,
        samples: str,
        also: Sequence[Architecture],
        beaten: Sequence[Architecture],
    ) -> SearchResult:
        main = self._request
        looks = {"also": [a.to_dict() for a in also], "beaten": [a.to_dict() for a in beaten]}
        request = SearchRequest(
            target=main.target,
            latency_ms=latencies_ms,
            limits=main.limits,
            objective=main.objective,
            min_accuracy=main.min_accuracy,
            tolerance_points=main.tolerance_points,
            confidence=main.confidence,
            predictors=predictors,
            supernet=supernet,
            data=main.data,
            device=self._device,
            compiler_image=main.compiler_image,
            measurements=samples,
            verify=_LOOKS,
            rounds=main.rounds,
            **self._working,
            seed=main.seed,
            name=main.name,
        )
        return self._step(
            "search",
            SearchResult,
            _inputs(request) | (looks if also else {}),
            ("fit", "supernet"),
            lambda _, tags: run_search(request, tags=tags, also=also, beaten=beaten),
        )

    def _finetune(self, subnet: str, place: str) -> FinetuneResult:
        main = self._request
        request = FinetuneRequest(
            subnet=subnet,
            data=main.data,
            preset=main.preset,
            epochs=main.finetune_epochs,
            max_train=main.max_train,
            target=main.target,
            seed=main.seed,
        )
        inputs = _inputs(request)
        with self._kept("finetune", inputs, ("search",), "finetunes") as directory:
            checkpoint = directory / "checkpoint.safetensors"
            return self._step(
                "finetune",
                FinetuneResult,
                inputs,
                ("search",),
                lambda _, tags: run_finetune(request, checkpoint=checkpoint, tags=tags),
                place=place,
            )

    def _quantize(self, subnet: str, place: str) -> QuantizeResult:
        from foxnas_mlflow.tflite import find_compiler

        main = self._request
        request = QuantizeRequest(
            subnet=subnet,
            data=main.data,
            target=main.target,
            seed=main.seed,
            compiler_image=main.compiler_image,
            max_accuracy_drop=main.max_accuracy_drop,
            repair_epochs=main.repair_epochs,
            max_false_accept=main.max_false_accept,
            unknown=main.unknown,
            name=main.name,
        )
        inputs = _inputs(request)
        if self._target.runtime == "edgetpu":
            # Without one no file for the Edge TPU is made.
            inputs["compiler"] = find_compiler(main.compiler_image) is not None
        return self._step(
            "quantize",
            QuantizeResult,
            inputs,
            ("search", f"finetune{place}"),
            lambda _, tags: run_quantize(request, tags=tags),
            place=place,
        )

    def _benchmark(self, model: str, place: str) -> BenchmarkResult:
        main = self._request
        cluster = {key: value for key, value in self._working.items() if key != "workers"}
        request = BenchmarkRequest(
            model=model,
            target=main.target,
            device=self._device,
            sustained_seconds=main.sustained_seconds,
            energy=main.energy,
            name=main.name,
            **cluster,
        )

        def benchmark(_: Sequence[str], tags: Mapping[str, str]) -> Result:
            from foxnas_mlflow.workflows._timers import first_answering

            # One model is measured on one board; boards that share work are alike.
            with open_executor(request) as executor:
                board = first_answering(self._device, executor)
            return run_benchmark(request.replace(device=board), tags=tags)

        return self._step(
            "benchmark",
            BenchmarkResult,
            _inputs(request),
            (f"quantize{place}",),
            benchmark,
            place=place,
            # A machine that was busy may be quiet now.
            holds=lambda outputs: bool(outputs["valid"]),
        )

    def _compare(self, supernet: str, samples: str, models: Sequence[str], found: SearchResult) -> CompareResult:
        main = self._request
        request = CompareRequest(
            models=tuple(models),
            subnets=tuple(found.model_uris),
            predictors=found.predictors_uri,
            measurements=samples,
            supernet=supernet,
            data=main.data,
            latency_ms=found.latency_ms,
            limits=found.limits,
            objective=main.goal,
            min_accuracy=main.min_accuracy,
            confidence=main.confidence,
            n_compare=main.n_compare,
            target=main.target,
            device=self._device,
            compiler_image=main.compiler_image,
            **self._working,
            seed=main.seed,
            name=main.name,
        )
        inputs, after = _inputs(request), ("supernet", "fit", "quantize")
        with self._kept("compare", inputs, after, "comparisons") as directory:
            return self._step(
                "compare",
                CompareResult,
                inputs,
                after,
                lambda _, tags: run_compare(request, directory=directory, tags=tags),
                # Where latencies were not valid it told nothing.
                holds=lambda outputs: not self._device or "found_dominated" in outputs["metrics"],
            )

    def _promote(self, model: str) -> PromoteResult:
        """Ask the gates, unless they let this very version through and it still is where they put it."""
        from foxnas_mlflow.tracking.registry import holds_stage

        main = self._request
        request = PromoteRequest(
            model=model,
            stage=main.stage,
            # A limit that nobody asked for, as that of the knee, refuses nothing.
            max_latency_ms=main.asked_latency_ms or 0.0,
            max_accuracy_drop=main.max_accuracy_drop,
        )

        def promote(_: Sequence[str], tags: Mapping[str, str]) -> Result:
            # What serves already is not moved back: it must still pass.
            stage = "Production" if holds_stage(model, "Production") else main.stage
            return run_promote(request.replace(stage=stage), tags=tags)

        return self._step(
            "promote",
            PromoteResult,
            _inputs(request),
            ("quantize", "benchmark"),
            promote,
            # What somebody else moved since then is moved again.
            holds=lambda _: any(holds_stage(model, stage) for stage in (main.stage, "Production")),
        )

    def _step(
        self,
        name: str,
        result: type[S],
        inputs: Mapping[str, Any],
        after: Sequence[str],
        do: _Do,
        *,
        place: str = "",
        holds: Callable[[Mapping[str, Any]], bool] = lambda outputs: True,
    ) -> S:
        """Find or do a step, or wait for another pipeline that does it.

        Args:
            name: Name of the step.
            result: Class of its result.
            inputs: What its result depends on beside the steps before it and the data.
            after: Steps whose results it depends on.
            do: Does it.
            place: What its name ends with in `done` where several networks were found.
            holds: Whether a result that is found still holds.
        """
        import dataclasses

        from foxnas_mlflow.tracking.steps import run_step

        def action(cut_off: Sequence[str], tags: Mapping[str, str]) -> Mapping[str, Any]:
            made = do(cut_off, tags)
            logger.info(made.describe())
            return made.to_dict()

        logger.info("\n== %s (%d of %d)", name + place, STEPS.index(name) + 1, len(STEPS))
        done = run_step(self._run, self._identity(name, inputs, after), action, holds=holds)
        self.done[name + place] = dataclasses.replace(done, name=name + place)
        how = "found, its inputs are unchanged" if done.reused else f"done in {done.seconds:.0f} s"
        logger.info("== %s: %s; run %s", name + place, how, done.run_id)
        return result.from_dict(done.outputs)

    def _identity(self, name: str, inputs: Mapping[str, Any], after: Sequence[str]) -> Step:
        from foxnas_mlflow.tracking.steps import Step

        before = {step: self.done[step].run_id for step in after if step in self.done}
        common, arguments = dict(self._common), dict(inputs)
        if name == "supernet":
            # One for every target, every board and whatever it is called.
            common = {key: common[key] for key in ("data", "space")}
            del arguments["name"]
        return Step(name, {"arguments": arguments, "after": before, **common})

    @contextlib.contextmanager
    def _kept(self, name: str, inputs: Mapping[str, Any], after: Sequence[str], place: str) -> Iterator[Path]:
        """A directory that the same step finds again until it is known as done."""
        import shutil

        from foxnas_mlflow.core.files import cache_directory

        directory = cache_directory(place, self._identity(name, inputs, after).digest[:32])
        yield directory
        # Another pipeline that waited for the same step is here too.
        shutil.rmtree(directory, ignore_errors=True)


def _inputs(request: Request) -> dict[str, Any]:
    """What a step's result depends on; models and pictures that are files count by their content."""
    values = {key: value for key, value in request.values().items() if key not in _MOVABLE}
    values |= {key: _content_of(values[key]) for key in (*_MODELS, "unknown") if key in values}
    return values | {key: where_measured(values[key]) for key in ("device",) if key in values}


def _content_of(given: str) -> str:
    """What a parameter stands for: the digest of a file, or of a folder's names and files, else what was given."""
    from pathlib import Path

    from foxnas_mlflow.core.files import file_digest, json_digest

    path = Path(given).expanduser()
    if given and path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return json_digest([[str(file.relative_to(path)), file_digest(file)] for file in files])
    return file_digest(path) if path.is_file() else given


def _check_samples(n_samples: int, space: SearchSpace, *, measured: bool) -> None:
    """Refuse samples that no predictors could be fitted to, which `fit` would tell after the training."""
    from foxnas_mlflow.core.predictors import rows_needed

    quantities = ("accuracy", "latency_ms") if measured else ("accuracy",)
    needed = max(rows_needed(quantity, space, space.image_sizes) for quantity in quantities)
    if min(n_samples, space.n_architectures) < needed:
        few = space.n_architectures < needed
        raise InvalidInputError(
            f"predictors of the space {space.name} need at least {needed} networks",
            received=f"a space of {space.n_architectures}" if few else f"n_samples {n_samples}",
            remedy="use a larger space" if few else f"give {needed} or more; {MainRequest().n_samples} is the default",
        )


def _rows_to_go_on_from(cut_off: Sequence[str], n_samples: int) -> str:
    """What to resume from: the rows of the run that was cut off, or what that run resumed from.

    The latter where this host's cache has its rows: the same command finds that cache by what it resumes from. It has
    not those of another host, of a cache that is gone, or all.
    """
    import tempfile

    from foxnas_mlflow.core.files import cache_directory
    from foxnas_mlflow.tracking.inputs import MEASUREMENTS
    from foxnas_mlflow.tracking.run import download_artifact
    from foxnas_mlflow.tracking.steps import began_here, has_artifact, param_of

    for run_id in cut_off:
        if not has_artifact(run_id, MEASUREMENTS):
            continue
        with tempfile.TemporaryDirectory(prefix="foxnas-") as directory:
            rows = set(download_artifact(run_id, MEASUREMENTS, directory).read_bytes().splitlines())
        if not began_here(run_id) or len(rows) > n_samples:
            return run_id
        for path in cache_directory("samples").glob(f"*/{MEASUREMENTS}"):
            # Another sampling that ends removes its own.
            with contextlib.suppress(FileNotFoundError):
                # The run's table is a copy of its cache's, of a while before.
                if rows <= set(path.read_bytes().splitlines()):
                    return param_of(run_id, "resume")
        return run_id
    return ""


def _require(module: str, extra: str, feature: str) -> None:
    """Refuse at once what a later step would miss; importing it can wait until then."""
    import importlib.util

    from foxnas_mlflow.core.errors import import_or_raise

    if importlib.util.find_spec(module) is None:
        import_or_raise(module, extra=extra, feature=feature)


def _machine(
    device: str, target: Target, space: SearchSpace, compiler_image: str, energy: str, executor: Executor | None
) -> str:
    """The machine behind an address and its runtime, ready to measure for the target; of several boards their kinds.

    Raises:
        DeviceError: If one does not answer, or lacks something; without the compiler that its Edge TPU needs; if
            boards that shall share the work are not alike.
    """
    from foxnas_mlflow.core.errors import DeviceError
    from foxnas_mlflow.runtime import FITTING_LIBRARY
    from foxnas_mlflow.tflite import require_compiler
    from foxnas_mlflow.workflows._timers import check_device, open_device

    if not device:
        return ""
    if target.runtime == "edgetpu":
        require_compiler(compiler_image)
    kinds = set()
    for address in addresses(device):
        found = check_device(address, executor)
        if not found.ready:
            raise DeviceError("a device must have what measuring needs", received=f"{address} lacks {found.missing[0]}")
        if target.runtime == "edgetpu" and not found.edgetpu:
            raise DeviceError(
                f"the target {target.name} is measured on an Edge TPU",
                received=f"none that answers on {address}",
                remedy=f"give --device none for the cost model, or plug it in and install there {FITTING_LIBRARY}",
            )
        kinds.add(f"{found.device}, {found.runtime}")
    # Several are compared when they are opened, and looked at for their meters.
    with contextlib.ExitStack() as stack:
        if len(addresses(device)) > 1 or energy:
            stack.enter_context(
                open_device(target, space, device, compiler_image=compiler_image, energy=energy, executor=executor)
            )
    return ", ".join(sorted(kinds))


WORKFLOW = Workflow(
    "main",
    "From images to a promoted model: supernet, sample, fit, search, quantize, benchmark, compare, promote.",
    MainRequest,
    run_main,
)
