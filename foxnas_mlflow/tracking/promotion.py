"""Promotion of a registered version: gates, the move, rollback, and what is written down of them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Metric, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from foxnas_mlflow.core.errors import FoxNasError, InvalidFormatError, PromotionError
from foxnas_mlflow.core.targets import BUILTIN_TARGETS
from foxnas_mlflow.devices import Benchmark
from foxnas_mlflow.flavor import (
    FLAVOR_NAME,
    Manifest,
    check_seal,
    check_signature,
    check_signed,
    main_file,
    model_id_of,
    read_manifest,
    sealed,
)
from foxnas_mlflow.tracking.benchmark import BENCHMARK_FILE, BENCHMARK_SIGNATURE
from foxnas_mlflow.tracking.gates import (
    ACCURACY,
    DROP,
    LATENCY,
    SUSTAINED,
    SUSTAINED_SECONDS,
    Candidate,
    Measured,
    Verdict,
    judge,
    passed,
)
from foxnas_mlflow.tracking.history import former_versions
from foxnas_mlflow.tracking.holders import ARCHIVED, STAGES, StageKeeper
from foxnas_mlflow.tracking.registry import describe_version, is_away, lacks_right, metrics_of, reason, version_uri
from foxnas_mlflow.tracking.run import EntryRun, download_artifact
from foxnas_mlflow.tracking.steps import has_artifact

PROMOTION_FORMAT = 1
PROMOTION_FILE = "promotion.json"

logger = logging.getLogger("foxnas_mlflow")


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """What a promotion was asked and did.

    Attributes:
        name: The registered model.
        version: The version that was to be moved.
        stage: The stage that it was to hold.
        action: ``promote``, ``rollback`` or ``archive``.
        former: Who held the stage before, or None.
        holder: Who holds it now, or None.
        verdicts: What the gates said; a rollback asks none.
        dry_run: Whether moving was left out.
        stages: Whether the registry has stages beside aliases.
        error: Why it was not done, or empty.
    """

    name: str
    version: str
    stage: str
    action: str
    former: str | None = None
    holder: str | None = None
    verdicts: tuple[Verdict, ...] = ()
    dry_run: bool = False
    stages: bool = True
    error: str = ""

    @property
    def uri(self) -> str:
        """URI of the version."""
        return version_uri(self.name, self.version)

    def to_dict(self, run_id: str) -> dict[str, Any]:
        """The content of ``promotion.json``."""
        values = dataclasses.asdict(self)
        values["verdicts"] = [dataclasses.asdict(verdict) for verdict in self.verdicts]
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return {"format": PROMOTION_FORMAT, "at": now, "run_id": run_id, **values}


def promote(
    run: EntryRun,
    version: ModelVersion,
    stage: str,
    *,
    max_latency_ms: float,
    max_accuracy_drop: float,
    dry_run: bool,
    verify_key: Path | None = None,
) -> Promotion:
    """Move a version to a stage if every gate passes.

    The verdicts become tags of the version and ``promotion.json`` of the run, whatever they are.

    Args:
        run: The open run.
        version: The version.
        stage: ``Staging`` or ``Production``.
        max_latency_ms: Largest 90th percentile of the measured latency; 0: any.
        max_accuracy_drop: Most points of top-1 that quantization may cost.
        dry_run: Judge only; the registry is left as it is.
        verify_key: Public key that the version and its measurement must be signed with; None: no signature is asked
            for.

    Raises:
        InvalidInputError: If `verify_key` cannot be read.
        InvalidFormatError: If the version's files are not as they were logged, or not of flavor foxnas.
        PromotionError: If a gate fails, the registry refuses, or another promotion came in between.
    """
    keeper, number = StageKeeper(version.name), str(version.version)
    former = keeper.holder(stage)
    promotion = Promotion(
        name=version.name,
        version=number,
        stage=stage,
        action="promote",
        former=former,
        holder=former,
        dry_run=dry_run,
    )
    with _refusal_told(run, promotion):
        if version.status != "READY":
            raise PromotionError(
                "only a version that is ready is promoted", received=f"{version.name} is {version.status}"
            )
        if stage == "Staging" and keeper.holder("Production") == number:
            raise PromotionError(
                "the production version does not go back to staging",
                received=f"{version.name} version {number}",
                remedy="promote another version to Production first, or roll back",
            )
        candidate, files = _candidate(version, run.directory, verify_key)
        if verify_key is not None:
            candidate = dataclasses.replace(candidate, signature=_signed(files, verify_key))
    holder = None if former is None else _holder(version.name, former, run.directory / "holder", verify_key)
    verdicts = tuple(judge(candidate, holder, max_latency_ms=max_latency_ms, max_accuracy_drop=max_accuracy_drop))
    promotion = dataclasses.replace(promotion, verdicts=verdicts)
    logger.info(_table(promotion))
    if not passed(verdicts):
        failed = "; ".join(f"{v.gate}: {v.text}" for v in verdicts if not v.passed)
        promotion = dataclasses.replace(promotion, error=failed)

    def mark() -> None:
        keeper.tag(number, _tags(promotion, run.run_id))
        _describe(version.name, candidate)

    return _carry_out(run, keeper, promotion, mark=mark)


def rollback(run: EntryRun, name: str, stage: str, *, leaving: str | None, dry_run: bool) -> Promotion:
    """Give a stage back to the version that held it before.

    No gate is asked: that version passed them, and a rollback must not wait for figures. Only its files must be as they
    were.

    Args:
        run: The open run.
        name: The registered model.
        stage: ``Staging`` or ``Production``.
        leaving: The version that the user believes to be the holder, or None.
        dry_run: Say what would be done.

    Raises:
        PromotionError: If `leaving` is not the holder, or there is nobody to go back to.
    """
    keeper = StageKeeper(name)
    holder = keeper.holder(stage)
    promotion = Promotion(
        name=name, version="", stage=stage, action="rollback", former=holder, holder=holder, dry_run=dry_run
    )
    with _refusal_told(run, promotion):
        version = _gone_back_to(run, keeper, stage, holder, leaving)
    return _carry_out(run, keeper, dataclasses.replace(promotion, version=version))


def _gone_back_to(run: EntryRun, keeper: StageKeeper, stage: str, holder: str | None, leaving: str | None) -> str:
    """The version that held a stage before, whose files are whole."""
    name = keeper.name
    if leaving is not None and leaving != holder:
        raise PromotionError(
            "a rollback leaves the version that holds the stage",
            received=f"version {leaving}, while version {holder or 'none'} holds {stage}",
            remedy=f"give models:/{name} to go back from whatever holds it",
        )
    # A version has one stage: of those that held Staging before, one may be the production version now.
    production = keeper.holder("Production")
    before = [former for former in former_versions(keeper.history(stage)) if former != holder]
    for former in before:
        if former != production and _is_ready(name, former):
            break
    else:
        but = f" but version {production}, which holds Production" if production in before else ""
        raise PromotionError(
            "a rollback needs a version that held the stage before",
            received=f"{name} has none for {stage}{but}",
            remedy="see foxnas promote --history",
        )
    try:
        checked_files(MlflowClient().get_model_version(name, former), run.directory)
    except (InvalidFormatError, PromotionError) as error:
        raise PromotionError(
            "a rollback goes to a version whose files are as they were logged",
            received=f"{name} version {former}: {error.received}",
            remedy="nothing was moved; promote a version that is whole",
        ) from error
    return former


def archive(run: EntryRun, version: ModelVersion, *, dry_run: bool) -> Promotion:
    """Withdraw a version from whatever it holds."""
    promotion = Promotion(
        name=version.name, version=str(version.version), stage=ARCHIVED, action="archive", dry_run=dry_run
    )
    return _carry_out(run, StageKeeper(version.name), promotion)


@contextlib.contextmanager
def _refusal_told(run: EntryRun, promotion: Promotion) -> Iterator[None]:
    """Write ``promotion.json`` of what is refused before any gate is asked."""
    try:
        yield
    except FoxNasError as error:
        run.log_json(dataclasses.replace(promotion, error=str(error)).to_dict(run.run_id), PROMOTION_FILE)
        raise


def _carry_out(
    run: EntryRun, keeper: StageKeeper, promotion: Promotion, *, mark: Callable[[], None] = lambda: None
) -> Promotion:
    """Move what is to be moved, see who holds the stage then, and write down how it went.

    Args:
        run: The open run; it gets ``promotion.json`` however this ends.
        keeper: Moves the versions.
        promotion: What was asked; with an `error` nothing is moved.
        mark: Writes the verdicts to the version, before a move and also where none is made.
    """
    try:
        if not promotion.dry_run:
            mark()
        if promotion.error:
            raise PromotionError(
                "a version is promoted when every gate passes",
                received=f"{promotion.name} version {promotion.version} fails {promotion.error}",
                remedy="nothing was moved",
            )
        if not promotion.dry_run:
            holder = None
            if promotion.stage == ARCHIVED:
                keeper.archive(promotion.version, run_id=run.run_id)
            else:
                holder = keeper.move(
                    promotion.version,
                    promotion.stage,
                    former=promotion.former,
                    action=promotion.action,
                    run_id=run.run_id,
                )
            promotion = dataclasses.replace(promotion, holder=holder, stages=keeper.has_stages)
            if promotion.stage != ARCHIVED and holder != promotion.version:
                raise PromotionError(
                    "one promotion at a time moves a stage",
                    received=f"version {holder or 'none'} took {promotion.stage} in the meantime",
                    remedy="see foxnas promote --history, and promote again if this version is the better one",
                )
    except PromotionError as error:
        promotion = dataclasses.replace(promotion, error=str(error))
        raise
    finally:
        run.log_json(promotion.to_dict(run.run_id), PROMOTION_FILE)
    return promotion


@dataclass(frozen=True, slots=True)
class CheckedFiles:
    """The downloaded files of a version, which are as they were logged.

    Attributes:
        directory: Where they are.
        manifest: Their manifest.
        model_id: Id of the logged model, or None.
        is_sealed: Whether the registry has the manifest's digest.
    """

    directory: Path
    manifest: Manifest
    model_id: str | None
    is_sealed: bool


def checked_files(version: ModelVersion, directory: Path) -> CheckedFiles:
    """Download a version's files and compare them with their manifest and its seal.

    Args:
        version: The version.
        directory: Where to put them.

    Raises:
        InvalidFormatError: If they are not as they were logged, or not of flavor foxnas.
        PromotionError: If they, or the logged model that they are of, are not there.
    """
    place = directory / "version"
    place.mkdir()
    uri = version_uri(version.name, version.version)
    model_id = model_id_of(version)
    try:
        expected = None if model_id is None else sealed(model_id)
    except MlflowException as error:
        if not _is_gone(error, version):
            raise
        raise PromotionError(
            "a version needs the logged model that it was registered from: its seal and its measurements are there",
            received=f"{uri}, whose model {model_id} was deleted",
            remedy="make it again with foxnas quantize, and delete this version",
        ) from error
    try:
        local = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(place)))
        flavors = Model.load(str(local)).flavors
    except (MlflowException, OSError) as error:
        if is_away(error):
            raise
        raise PromotionError(
            "the files of a version must be in the artifact store", received=f"{uri}: {reason(error)}"
        ) from error
    if FLAVOR_NAME not in flavors:
        raise InvalidFormatError("a version must be a model of flavor foxnas", received=f"{uri} has {sorted(flavors)}")
    manifest = read_manifest(local / flavors[FLAVOR_NAME]["data"])
    check_seal(manifest, expected)
    return CheckedFiles(local, manifest, model_id, expected is not None)


def _is_gone(error: MlflowException, version: ModelVersion) -> bool:
    """Whether a registry says that the logged model of a version was deleted.

    A server that asks who is there says of a model that is gone what it says of one that may not be read: that it is
    gone is known where the run that logged it, of the same experiment, may be read.
    """
    if not lacks_right(error) or not version.run_id:
        return bool(error.error_code == "RESOURCE_DOES_NOT_EXIST")
    try:
        MlflowClient().get_run(version.run_id)
    except MlflowException:
        return False
    return True


def _candidate(version: ModelVersion, directory: Path, verify_key: Path | None) -> tuple[Candidate, CheckedFiles]:
    """What is known of a version whose files are downloaded and checked."""
    files = checked_files(version, directory)
    manifest = files.manifest
    details = manifest.metadata.get("details", {})
    known = held(version.name, str(version.version), verify_key)
    # Sealed, unless it was made for no target in particular and is registered for one.
    target = str(details.get("target", "")) or known.target
    builtin = BUILTIN_TARGETS.get(target)
    candidate = dataclasses.replace(
        known,
        figures={**known.figures, **{key: float(value) for key, value in details.get("figures", {}).items()}},
        kind=manifest.kind,
        weights=str(manifest.metadata.get("weights", "none")),
        sha256=manifest.files[main_file(manifest.kind)],
        target=target,
        machine=str(details.get("machine", "")) if builtin is None else builtin.machine,
        threads=int(details.get("threads", 0)) if builtin is None else builtin.threads,
        sealed=files.is_sealed,
    )
    return _with_images(candidate, manifest), files


def _holder(name: str, number: str, directory: Path, verify_key: Path | None) -> Candidate:
    """What is known of the version that holds a stage: from its files, where they are there and whole."""
    directory.mkdir()
    known = held(name, number, verify_key)
    try:
        files = checked_files(MlflowClient().get_model_version(name, number), directory)
    except (InvalidFormatError, PromotionError):
        return known
    return _with_images(known, files.manifest)


def _with_images(candidate: Candidate, manifest: Manifest) -> Candidate:
    """A version with what its sealed description says of images and classes; earlier releases sealed no images."""
    provenance = manifest.metadata.get("details", {}).get("provenance", {})
    return dataclasses.replace(
        candidate,
        evaluated_digest=str(provenance.get("evaluated_digest", "")),
        labels=tuple(map(str, manifest.metadata.get("labels", ()))),
    )


def _signed(files: CheckedFiles, public_key: Path) -> str:
    """What is wrong with the signature of a version's model, or empty."""
    try:
        check_signed(files.directory, files.model_id, public_key)
    except InvalidFormatError as error:
        return str(error)
    return ""


def held(name: str, number: str, verify_key: Path | None = None) -> Candidate:
    """What the registry knows of a version, whose target is taken from its tag: its files may be gone.

    Args:
        name: The registered model.
        number: The version.
        verify_key: Public key that measurements must be signed with; None: no signature is asked for.
    """
    version = MlflowClient().get_model_version(name, number)
    model_id = model_id_of(version)
    try:
        metrics = [] if model_id is None else metrics_of(model_id)
    except MlflowException as error:
        if not _is_gone(error, version):
            raise
        metrics = []  # a holder whose model was deleted keeps nobody out
    benchmarks, unread = _benchmarks(metrics, verify_key)
    # What other runs say of the model is not what was found when it was made.
    own = None if model_id is None or not metrics else MlflowClient().get_logged_model(model_id).source_run_id
    return Candidate(
        number,
        {metric.key: metric.value for metric in metrics if own in (None, metric.run_id)},
        benchmarks,
        dict(version.tags),
        target=version.tags.get("target", ""),
        unread=unread,
    )


def _benchmarks(metrics: Sequence[Metric], verify_key: Path | None) -> tuple[tuple[Measured, ...], tuple[str, ...]]:
    """The measurements of a model, the newest first, and the runs of those that this user may not read.

    One whose run was deleted counts no more.
    """
    client = MlflowClient()
    found, unread = [], []
    for run_id in dict.fromkeys(m.run_id for m in reversed(metrics) if m.key == LATENCY and m.run_id):
        try:
            run = client.get_run(run_id)
            if run.info.lifecycle_stage == LifecycleStage.ACTIVE:
                found.append(_measured(run, verify_key))
        except (MlflowException, OSError) as error:
            if lacks_right(error) and not is_away(error):
                unread.append(run_id)
            elif getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
                raise
    return tuple(found), tuple(unread)


def _measured(run: Run, verify_key: Path | None) -> Measured:
    """What a run's document says that was measured; without one nothing was."""
    target, source = (run.data.tags.get(f"foxnas.{key}", "") for key in ("target", "latency_source"))
    unknown = Measured(run_id=run.info.run_id, figures={}, target=target, machine=run.data.tags.get("foxnas.board", ""))
    if not has_artifact(run.info.run_id, BENCHMARK_FILE):
        return unknown
    with tempfile.TemporaryDirectory(prefix="foxnas-") as directory:
        path = download_artifact(run.info.run_id, BENCHMARK_FILE, directory)
        try:
            benchmark = Benchmark.from_dict(json.loads(path.read_bytes()))
            figures, threads = benchmark.metrics(), int(benchmark.threads)
            if benchmark.sustained_seconds < SUSTAINED_SECONDS:
                figures.pop(SUSTAINED, None)
        except (ValueError, TypeError, LookupError, AttributeError, InvalidFormatError):
            return unknown
        unsigned = "" if verify_key is None else _unsigned(run.info.run_id, path, verify_key)
    return Measured(
        run_id=run.info.run_id,
        figures=figures,
        target=target,
        machine=str(benchmark.device),
        emulated=bool(benchmark.emulated),
        source=source,
        sha256=str(benchmark.model_sha256),
        unsigned=unsigned,
        threads=threads,
    )


def _unsigned(run_id: str, document: Path, public_key: Path) -> str:
    """What is wrong with the signature of a measurement, or empty."""
    if not has_artifact(run_id, BENCHMARK_SIGNATURE):
        return "nobody signed its measurement"
    signature = download_artifact(run_id, BENCHMARK_SIGNATURE, document.parent).read_text(encoding="utf-8")
    try:
        check_signature(document, signature, public_key)
    except InvalidFormatError as error:
        return str(error)
    return ""


def _is_ready(name: str, number: str) -> bool:
    try:
        return bool(MlflowClient().get_model_version(name, number).status == "READY")
    except MlflowException as error:
        # A registry that fails to tell of a version does not say that an older one is to be gone back to.
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def _describe(name: str, candidate: Candidate) -> None:
    shown = {ACCURACY: "int8 top-1, %", DROP: "lost by quantization, points"}
    facts: dict[str, object] = {
        words: candidate.figures[key] for key, words in shown.items() if key in candidate.figures
    }
    if candidate.benchmark is not None:
        facts |= {"latency p90, ms": candidate.latency_ms, "measured on": str(candidate.benchmark)}
    facts |= {"weights": candidate.weights, "SHA-256": candidate.sha256}
    command = f"mlflow models serve -m {shlex.quote(version_uri(name, candidate.version))} --env-manager local"
    describe_version(name, candidate.version, candidate.kind, facts=facts, command=command)


def _tags(promotion: Promotion, run_id: str) -> dict[str, str]:
    verdict = "failed" if promotion.error else "passed"
    tags = {f"gate.{v.gate}": f"{v.word}: {v.text}"[:250] for v in promotion.verdicts}
    return {**tags, "gates": f"{verdict} for {promotion.stage}", "promotion_run": run_id}


def _table(promotion: Promotion) -> str:
    lines = [f"{promotion.name} version {promotion.version} to {promotion.stage}:"]
    lines += [f"  {verdict.gate:<14}{verdict.word:<6}{verdict.text}" for verdict in promotion.verdicts]
    return "\n".join(lines)


__all__ = ["PROMOTION_FILE", "STAGES", "Promotion", "archive", "held", "promote", "rollback"]
