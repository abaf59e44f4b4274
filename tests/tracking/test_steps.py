"""Steps that are found again, and runs that a killed process leaves behind."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.flavor import TfliteModel
from foxnas_mlflow.tracking.process import is_dead, process_identity

pytestmark = pytest.mark.server

PIPELINE = """
import sys, time
from foxnas_mlflow.tracking.run import entry_run
from foxnas_mlflow.tracking.steps import Step, run_step

def act(cut_off, tags):
    with entry_run(stage="sample", params={}, tags=tags) as run:
        print(run.run_id, flush=True)
        time.sleep(600)

with entry_run(stage="main", params={}) as parent:
    run_step(parent, Step("sample", {"seed": 0}), act)
"""


TOGETHER = """
import os, sys, time
from mlflow.store.tracking import sqlalchemy_store
from foxnas_mlflow.tracking import steps
from foxnas_mlflow.tracking.run import entry_run

steps._WAIT_SECONDS = (0.02, 0.2)

def act(cut_off, tags):
    with entry_run(stage="sample", params={}, tags=tags) as run:
        time.sleep(0.3)
        return {"run_id": run.run_id}

# What is imported is shared; the connections to the store are each process's own.
n_processes, n_steps = map(int, sys.argv[1:])
children = []
for _ in range(n_processes):
    children.append(os.fork())
    if not children[-1]:
        with entry_run(stage="main", params={}) as parent:
            found = [steps.run_step(parent, steps.Step("sample", {"seed": i}), act).run_id for i in range(n_steps)]
        os.write(1, f"{' '.join(found)}\\n".encode())
        os._exit(0)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


class Action:
    """A step that counts how often it is done."""

    def __init__(self, outputs: Mapping[str, Any] | None = None) -> None:
        self.outputs = outputs or {}
        self.cut_off: list[list[str]] = []

    def __call__(self, cut_off: Sequence[str], tags: Mapping[str, str]) -> Mapping[str, Any]:
        from foxnas_mlflow.tracking.run import entry_run

        self.cut_off.append(list(cut_off))
        with entry_run(stage="sample", params={}, tags=tags) as run:
            return {"run_id": run.run_id, **self.outputs}


def test_a_finished_step_is_found_by_its_inputs(tracking: str) -> None:
    import mlflow

    from foxnas_mlflow.tracking.run import entry_run
    from foxnas_mlflow.tracking.steps import Step, run_step

    action = Action({"accuracy": 97.5})
    with entry_run(stage="main", params={}) as first:
        done = run_step(first, Step("sample", {"seed": 0, "data": "digits"}), action)
        assert not done.reused
    with entry_run(stage="main", params={}) as second:
        again = run_step(second, Step("sample", {"data": "digits", "seed": 0}), action)
        assert again.reused
        assert (again.run_id, again.outputs) == (done.run_id, {"run_id": done.run_id, "accuracy": 97.5})
        assert not run_step(second, Step("sample", {"seed": 1, "data": "digits"}), action).reused
        assert not run_step(second, Step("fit", {"seed": 0, "data": "digits"}), action).reused
    assert len(action.cut_off) == 3
    # It stays below the pipeline that did it, which has finished.
    assert mlflow.get_run(done.run_id).data.tags["mlflow.parentRunId"] == first.run_id


def test_a_step_whose_result_holds_no_more_is_done_again_and_told_of_it(tracking: str) -> None:
    from foxnas_mlflow.tracking.run import entry_run
    from foxnas_mlflow.tracking.steps import Step, run_step

    action = Action({"n_latencies": 3})
    with entry_run(stage="main", params={}) as parent:
        first = run_step(parent, Step("sample", {}), action)
        assert run_step(parent, Step("sample", {}), action, holds=lambda outputs: outputs["n_latencies"] >= 3).reused
        again = run_step(parent, Step("sample", {}), action, holds=lambda outputs: outputs["n_latencies"] > 3)
    assert not again.reused
    assert action.cut_off == [[], [first.run_id]]


@pytest.mark.parametrize("lost", ["version", "files of the version", "table", "page"])
def test_a_step_of_whose_result_something_is_gone_is_done_again(
    tracking: str, tmp_path: Path, lost: str, colour_model: TfliteModel
) -> None:
    import mlflow

    from foxnas_mlflow.flavor import log_model
    from foxnas_mlflow.tracking.run import entry_run
    from foxnas_mlflow.tracking.steps import Step, run_step

    n_done = 0

    def act(cut_off: Sequence[str], tags: Mapping[str, str]) -> Mapping[str, Any]:
        nonlocal n_done
        n_done += 1
        with entry_run(stage="quantize", params={}, tags=tags) as run:
            run.log_text("a,b", "tables/rows.csv")
            run.log_text("<html>", "report.html")
            info = log_model(colour_model, name="model", registered_model_name="m", code_paths=[])
        version = f"models:/m/{info.registered_model_version}"
        return {"run_id": run.run_id, "model_uris": [version], "measurements": f"runs:/{run.run_id}/tables/rows.csv"}

    with entry_run(stage="main", params={}) as parent:
        run_id = run_step(parent, Step("quantize", {}), act).run_id
        assert run_step(parent, Step("quantize", {}), act).reused
        (artifacts,) = (file.parent for file in tmp_path.glob(f"mlruns/**/{run_id}/artifacts/report.html"))
        if lost == "version":
            mlflow.MlflowClient().delete_model_version("m", "1")
        elif lost == "files of the version":
            (description,) = tmp_path.glob("mlruns/**/artifacts/MLmodel")
            shutil.rmtree(description.parent)
        else:
            (artifacts / {"table": "tables/rows.csv", "page": "report.html"}[lost]).unlink()
        assert not run_step(parent, Step("quantize", {}), act).reused
        assert run_step(parent, Step("quantize", {}), act).reused
    assert n_done == 2


def test_a_result_of_many_classes_is_found_again(tracking: str) -> None:
    from foxnas_mlflow.tracking.run import entry_run
    from foxnas_mlflow.tracking.steps import Step, run_step

    rows = [{"label": f"class {i}", "images": 100, "recall": 97.5, "taken_for": f"class {i + 1}"} for i in range(200)]
    action = Action({"classes": rows})
    with entry_run(stage="main", params={}) as parent:
        run_step(parent, Step("quantize", {}), action)
        found = run_step(parent, Step("quantize", {}), action)
    assert found.reused
    assert found.outputs["classes"] == rows


@pytest.mark.parametrize(("kept", "reused"), [(8000, True), (20, False)])
def test_results_that_their_tag_has_itself_are_found_unless_it_was_cut_off(
    tracking: str, kept: int, reused: bool
) -> None:
    """As releases before kept them."""
    from mlflow import MlflowClient

    from foxnas_mlflow.tracking.run import entry_run
    from foxnas_mlflow.tracking.steps import DIGEST_TAG, OUTPUTS_TAG, Step, run_step

    step, client = Step("sample", {"seed": 0}), MlflowClient()
    before = client.create_run("0", tags={DIGEST_TAG: step.digest}).info.run_id
    client.set_tag(before, OUTPUTS_TAG, json.dumps({"run_id": before, "accuracy": 97.5})[:kept])
    client.set_terminated(before)
    action = Action({"accuracy": 97.5})
    with entry_run(stage="main", params={}) as parent:
        done = run_step(parent, step, action)
    assert (done.reused, done.outputs["accuracy"]) == (reused, 97.5)
    assert action.cut_off == ([] if reused else [[before]])


@pytest.mark.parametrize("name", ["foxnas-cpu", "größe-cpu", 'anna\'s 100%_"net"-cpu'])
def test_a_version_of_any_name_is_known_to_be_in_use(tracking: str, name: str) -> None:
    from mlflow import MlflowClient

    from foxnas_mlflow.tracking import steps
    from foxnas_mlflow.tracking.run import entry_run

    client, uri = MlflowClient(), f"models:/{name}/1"
    with entry_run(stage="main", params={}) as parent:
        assert not steps._is_output(client, parent, uri)
        run_id = steps.run_step(parent, steps.Step("search", {}), Action({"model_uris": [uri]})).run_id
        assert steps._is_output(client, parent, uri)
        assert not steps._is_output(client, parent, f"{uri}2")
        client.set_tag(run_id, steps.OUTPUTS_TAG, json.dumps({"model_uris": [uri]}))
        assert steps._is_output(client, parent, uri)


def test_a_failed_step_is_done_again_and_told_of_its_runs(tracking: str) -> None:
    from mlflow import MlflowClient

    from foxnas_mlflow.tracking.run import entry_run
    from foxnas_mlflow.tracking.steps import DIGEST_TAG, Step, run_step

    def broken(cut_off: Sequence[str], tags: Mapping[str, str]) -> Mapping[str, Any]:
        with entry_run(stage="sample", params={}, tags=tags), entry_run(stage="inner", params={}):
            raise ConnectionError("no board")

    step = Step("sample", {"seed": 0})
    with pytest.raises(ConnectionError), entry_run(stage="main", params={}) as parent:
        run_step(parent, step, broken)
    # Runs inside the step's run are not the step.
    (failed,) = MlflowClient().search_runs(["0"], f"tags.`{DIGEST_TAG}` = '{step.digest}'")
    assert failed.info.status == "FAILED"
    action = Action()
    with entry_run(stage="main", params={}):
        run_step(parent, step, action)
    assert action.cut_off == [[failed.info.run_id]]


def test_what_sigkill_leaves_is_ended_and_offered_to_the_step(tracking: str) -> None:
    import mlflow

    from foxnas_mlflow.tracking.claims import Claims
    from foxnas_mlflow.tracking.run import end_dead_runs, entry_run
    from foxnas_mlflow.tracking.steps import Step, run_step

    with subprocess.Popen([sys.executable, "-c", PIPELINE], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        run_id = process.stdout.readline().strip()
        with entry_run(stage="main", params={}) as parent:
            assert end_dead_runs(parent.experiment_id) == []
            other = Claims(parent.run_id, parent.experiment_id).take(Step("sample", {"seed": 0}).digest)
            assert other is not None
            assert other.info.run_id == mlflow.get_run(run_id).data.tags["mlflow.parentRunId"]
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    action = Action()
    with entry_run(stage="main", params={}) as parent:
        # Its first act was to end the pipeline that was killed, and its step.
        assert end_dead_runs(parent.experiment_id) == []
        killed = mlflow.search_runs(filter_string="attributes.status = 'KILLED'", output_format="list")
        assert len(killed) == 2
        assert mlflow.get_run(run_id).info.status == "KILLED"
        run_step(parent, Step("sample", {"seed": 0}), action)
    assert action.cut_off == [[run_id]]
    assert mlflow.get_run(run_id).data.tags["mlflow.parentRunId"] == parent.run_id


def test_of_pipelines_at_once_one_works_and_the_others_wait_for_its_steps(tracking: str) -> None:
    import mlflow

    n_steps = 4
    command = [sys.executable, "-c", TOGETHER, "3", str(n_steps)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=240, check=True)
    outputs = [line.split() for line in done.stdout.splitlines()]
    assert len(outputs) == 3
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(set(outputs[0])) == n_steps
    steps = mlflow.search_runs(filter_string="tags.`foxnas.stage` = 'sample'", output_format="list")
    assert {run.info.run_id for run in steps} == set(outputs[0])
    mains = mlflow.search_runs(filter_string="tags.`foxnas.stage` = 'main'", output_format="list")
    # Who began when all was done has claimed nothing.
    assert [run.data.tags.get("foxnas.claim", "") for run in mains] == ["", "", ""]


def test_what_fails_is_gone_on_with_by_who_waited(tracking: str) -> None:
    from foxnas_mlflow.tracking.claims import CLAIM_TAG, Claims
    from foxnas_mlflow.tracking.run import entry_run
    from foxnas_mlflow.tracking.steps import Step, run_step

    step = Step("sample", {"seed": 0})

    def broken(cut_off: Sequence[str], tags: Mapping[str, str]) -> Mapping[str, Any]:
        with entry_run(stage="main", params={}) as other:
            assert Claims(other.run_id, other.experiment_id).take(step.digest) is not None
        raise ConnectionError("no board")

    with pytest.raises(ConnectionError), entry_run(stage="main", params={}) as parent:
        run_step(parent, step, broken)
    with entry_run(stage="main", params={}) as parent:
        claims = Claims(parent.run_id, parent.experiment_id)
        assert claims.take(step.digest) is None
        assert mlflow_tags(parent.run_id)[CLAIM_TAG] == step.digest
        # Two that claim at once step back both; nothing is ever done by two.
        with entry_run(stage="main", params={}) as other:
            assert Claims(other.run_id, other.experiment_id).take(step.digest) is not None
            assert mlflow_tags(other.run_id)[CLAIM_TAG] == ""
        claims.release()


@pytest.mark.parametrize("of", ["on another host", "that is hidden"])
def test_a_claimant_of_which_nothing_tells_is_taken_over_once_its_heart_stops(
    tracking: str, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    from mlflow import MlflowClient

    from foxnas_mlflow.tracking import claims, process, steps
    from foxnas_mlflow.tracking.run import entry_run

    identity = "elsewhere 7 8"
    if "hidden" in of:
        identity = f"{process_identity().rsplit(' ', 2)[0]} {os.getpid()} 1"
        monkeypatch.setattr(process, "_start", lambda pid: "?")
    client, step = MlflowClient(), steps.Step("sample", {"seed": 0})
    claimed = {"foxnas.process": identity, "foxnas.claim": step.digest, "foxnas.heartbeat": "-1"}
    there = client.create_run("0", tags=claimed).info.run_id
    tags = {"foxnas.process": identity, "mlflow.parentRunId": there, steps.DIGEST_TAG: step.digest}
    begun = client.create_run("0", tags=tags).info.run_id
    n_beats, waits = 8, []

    def wait(seconds: float) -> None:
        waits.append(claims.DEAD_SECONDS / 2)
        if len(waits) <= n_beats:
            client.set_tag(there, "foxnas.heartbeat", str(len(waits)))

    # A busy machine's own clock would let the other one die between two beats.
    clock = SimpleNamespace(sleep=wait, monotonic=lambda: sum(waits))
    monkeypatch.setattr(claims, "time", clock)
    monkeypatch.setattr(steps, "time", clock)
    action = Action()
    with entry_run(stage="main", params={}) as parent:
        steps.run_step(parent, step, action)
    # Not before its heart stood still for more than so long, and from what the dead one had left.
    assert len(waits) == n_beats + 3
    assert action.cut_off == [[begun]]
    assert [client.get_run(run_id).info.status for run_id in (there, begun)] == ["KILLED", "KILLED"]


@pytest.mark.parametrize("of", ["a pipeline that failed", "a pipeline that was deleted", "this very pipeline"])
def test_a_step_that_another_host_left_running_is_ended_and_handed_over(tracking: str, of: str) -> None:
    from mlflow import MlflowClient

    from foxnas_mlflow.tracking.run import entry_run
    from foxnas_mlflow.tracking.steps import DIGEST_TAG, Step, run_step

    client, step, action = MlflowClient(), Step("sample", {"seed": 0}), Action()
    before = client.create_run("0").info.run_id
    client.set_terminated(before, "FAILED")
    if "deleted" in of:
        client.delete_run(before)
    with entry_run(stage="main", params={}) as parent:
        tags = {"mlflow.parentRunId": parent.run_id if "this" in of else before, "foxnas.process": "elsewhere 7 8"}
        left = client.create_run("0", tags={**tags, DIGEST_TAG: step.digest}).info.run_id
        run_step(parent, step, action)
    assert action.cut_off == [[left]]
    assert client.get_run(left).info.status == "KILLED"
    if "deleted" not in of:
        assert mlflow_tags(left)["mlflow.parentRunId"] == parent.run_id


def test_a_pipeline_at_work_shows_its_heart_beating(tracking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from foxnas_mlflow.tracking import claims
    from foxnas_mlflow.tracking.run import entry_run

    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.05)
    seen: set[str] = set()
    with entry_run(stage="main", params={}) as run, claims.heartbeat(run.run_id):
        while len(seen) < 3:
            seen.add(mlflow_tags(run.run_id)[claims.HEARTBEAT_TAG])
    assert "foxnas-heartbeat" not in {thread.name for thread in threading.enumerate()}


def mlflow_tags(run_id: str) -> dict[str, str]:
    import mlflow

    return dict(mlflow.get_run(run_id).data.tags)


def test_sigterm_ends_step_and_pipeline_as_killed(tracking: str) -> None:
    import mlflow

    with subprocess.Popen([sys.executable, "-c", PIPELINE], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert [run.info.status for run in mlflow.search_runs(output_format="list")] == ["KILLED", "KILLED"]


def test_a_process_is_known_by_its_start() -> None:
    assert not is_dead(process_identity())
    host, pid, _ = process_identity().rsplit(" ", 2)
    assert is_dead(f"{host} {pid} 1")
    assert not is_dead(f"elsewhere {pid} 1")
    assert not is_dead("")
    # As releases before told it.
    assert is_dead(f"{host.partition(' ')[0]} {pid} 1")
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert is_dead(f"{host} {process.pid} 1")
    process.wait()


HIDDEN = """
import os, sys
from foxnas_mlflow.tracking.process import is_dead, process_identity

process_identity()
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
print([is_dead(identity) for identity in sys.argv[1:]])
"""


@pytest.mark.parametrize("hidepid", [1, 2])
def test_who_may_not_see_a_process_does_not_take_it_for_dead(hidepid: int) -> None:
    # A mount of its own: this machine's /proc stays as it is.
    hide = ["unshare", "-m", "sh", "-c", f'mount -t proc -o hidepid={hidepid} proc /proc && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*hide, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount /proc")
    host = process_identity().rsplit(" ", 2)[0]
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    # This process, one that has ended, and one whose id this process has now.
    asked = (process_identity(), f"{host} {ended.pid} 1", f"{host} {os.getpid()} 1")
    said = subprocess.run([*hide, sys.executable, "-c", HIDDEN, *asked], capture_output=True, text=True, check=False)
    assert said.stdout.strip() == "[None, True, None]", said.stderr


@pytest.fixture
def begun(tracking: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Begins a pipeline, and returns it before its first step."""
    from foxnas_mlflow import MainRequest
    from foxnas_mlflow.workflows.main import _Pipeline, run_main

    # The real `run` would train for minutes.
    monkeypatch.setattr(_Pipeline, "run", lambda self: self)
    return lambda **values: run_main(MainRequest(**{"data": "digits", **values}))


@pytest.mark.train
@pytest.mark.tflite
def test_a_pipeline_takes_the_versions_that_an_alias_and_latest_mean(begun: Any) -> None:
    from mlflow import MlflowClient

    from tests.supernets import register_mini_supernet

    uri = register_mini_supernet()
    MlflowClient().set_registered_model_alias("foxnas-supernet", "best", "1")
    for given in (uri, "models:/foxnas-supernet@best", "models:/foxnas-supernet/latest"):
        assert begun(target="rpi4", device="none", supernet=given)._request.supernet == uri
        # Its images are those that it was trained on, and not all that are there.
        assert len(begun(target="rpi4", device="none", supernet=given)._dataset.train) == 400
    with pytest.raises(InvalidInputError, match="predictors of the space cpu-mini need at least"):
        begun(target="rpi4", device="none", supernet=uri, n_samples=4)
    with pytest.raises(InvalidInputError, match="data must be the images that the supernet was trained on"):
        begun(target="rpi4", device="none", supernet=uri, data="glyphs")
    assert begun(target="rpi4", device="none", supernet=uri, finetune_epochs=1, max_train=9)._request.max_train == 9
    pipeline = begun(target="rpi4", device="none", init="models:/foxnas-supernet@best", teacher="runs:/0/m")
    assert (pipeline._request.init, pipeline._request.teacher) == (uri, "runs:/0/m")
    # A training that begins with the newest of what it registers is the same when its own is the newest.
    latest = "models:/foxnas-supernet/latest"
    identity = begun(target="rpi4", device="none", init=latest)._training()[1]
    register_mini_supernet()
    assert begun(target="rpi4", device="none", init=latest)._training()[1] == identity


@pytest.mark.train
@pytest.mark.tflite
def test_the_run_of_a_pipeline_says_what_is_searched_for(begun: Any) -> None:
    import mlflow

    for values, objective, latency_ms in (
        ({}, "accuracy", "auto"),
        ({"min_accuracy": 50}, "latency_ms", ""),
        ({"limits": "macs<=1e6"}, "accuracy", ""),
    ):
        run_id = begun(target="rpi4", device="none", **values)._run.run_id
        params = mlflow.get_run(run_id).data.params
        assert (params["cfg.objective"], params["cfg.latency_ms"]) == (objective, latency_ms)


@pytest.mark.train
@pytest.mark.tflite
def test_a_target_counts_by_the_content_of_its_files(begun: Any, tmp_path: Path) -> None:
    from foxnas_mlflow.core.predictors import reference_predictors

    def content(directory: str, *notes: str) -> Mapping[str, Any]:
        place = tmp_path / directory
        place.mkdir(exist_ok=True)
        predictors = reference_predictors("rpi4")
        latency = tuple(dataclasses.replace(each, notes=notes) for each in predictors.latency)
        dataclasses.replace(predictors, latency=latency).save(place / "board.json")
        (place / "board.yaml").write_text("{name: my-board, predictors: board.json}")
        return begun(target=str(place / "board.yaml"), device="none")._common

    first = content("a")
    assert content("b") == first
    assert content("a", "calibrated again")["target"] != first["target"]


def test_models_and_pictures_count_by_content(tmp_path: Path) -> None:
    from foxnas_mlflow.workflows import QuantizeRequest, SampleRequest
    from foxnas_mlflow.workflows.main import _inputs

    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "1.bmp").write_bytes(b"red")
    a, b = (str(tmp_path / place) for place in ("a", "b"))
    for request, key in ((QuantizeRequest(), "unknown"), (SampleRequest(), "supernet")):
        before = _inputs(request.replace(**{key: a}))
        assert before == _inputs(request.replace(**{key: b}))
        (tmp_path / "b" / "1.bmp").write_bytes(b"fed")
        assert before != _inputs(request.replace(**{key: b}))
        (tmp_path / "b" / "1.bmp").write_bytes(b"red")
    # A name is no path, whatever lies beside it.
    assert _inputs(SampleRequest(name=a))["name"] == a


def test_rows_are_found_however_long_a_lost_board_is_waited_for() -> None:
    from types import SimpleNamespace
    from typing import cast

    from foxnas_mlflow.core.space import CPU_SPACE
    from foxnas_mlflow.core.targets import get_target
    from foxnas_mlflow.tracking.inputs import TrainedSupernet
    from foxnas_mlflow.workflows import SampleRequest
    from foxnas_mlflow.workflows.main import _inputs
    from foxnas_mlflow.workflows.sample import _digest

    supernet = cast(TrainedSupernet, SimpleNamespace(digest="0" * 64, space=CPU_SPACE))
    first, again, other = (SampleRequest(device=f"ssh://{each}") for each in ("a", "a?wait=600", "b"))

    def digest(request: SampleRequest) -> str:
        return _digest(request, supernet, get_target("cpu"), [32], ())

    assert digest(first) == digest(again) != digest(other)
    assert _inputs(first) == _inputs(again) != _inputs(other)


@pytest.mark.tflite
def test_a_runtime_belongs_to_the_machine() -> None:
    from foxnas_mlflow.core.space import get_space
    from foxnas_mlflow.core.targets import get_target
    from foxnas_mlflow.workflows._timers import check_device
    from foxnas_mlflow.workflows.main import _machine

    found = check_device("local")
    assert _machine("local", get_target("cpu"), get_space("cpu"), "", "", None) == f"{found.device}, {found.runtime}"


def test_a_compiler_that_came_since_makes_another_quantization(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from foxnas_mlflow import MainRequest, get_target
    from foxnas_mlflow.workflows.main import _Pipeline

    seen = []

    class Seen(_Pipeline):
        def _step(self, name: str, result: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
            seen.append(inputs)

    monkeypatch.setenv("PATH", str(tmp_path))
    for target in ("edgetpu", "edgetpu", "rpi4"):
        pipeline = Seen(MainRequest(target=target), None, get_target(target), "", *[None] * 2)  # type: ignore[arg-type]
        pipeline._quantize("models:/foxnas-subnet/1", "")
        (tmp_path / "edgetpu_compiler").touch(0o755)
    assert [inputs.get("compiler") for inputs in seen] == [False, True, None]


def test_rows_that_the_cache_of_this_host_lost_are_taken_from_the_run(
    tracking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    from foxnas_mlflow.core.files import cache_directory
    from foxnas_mlflow.workflows.main import _rows_to_go_on_from

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    client = MlflowClient()

    def cut_off(process: str, n_rows: int, resume: str = "") -> str:
        run_id = client.create_run("0", tags={"foxnas.process": process}).info.run_id
        client.log_param(run_id, "cfg.resume", resume)
        client.log_text(run_id, "".join(f"row {i}\n" for i in range(-1, n_rows)), "measurements.csv")
        return str(run_id)

    here, elsewhere = cut_off(process_identity(), 3), cut_off("elsewhere 7 8", 3)
    assert _rows_to_go_on_from([here, elsewhere], 9) == here
    kept = cache_directory("samples", "digest") / "measurements.csv"
    kept.write_text("".join(f"row {i}\n" for i in range(-1, 2)))
    assert _rows_to_go_on_from([here, elsewhere], 9) == here
    kept.write_text("".join(f"row {i}\n" for i in range(-1, 5)))
    assert _rows_to_go_on_from([here, elsewhere], 9) == ""
    assert _rows_to_go_on_from([here], 3) == here
    # One that went on from other rows is found by them.
    again = cut_off(process_identity(), 3, resume=elsewhere)
    assert _rows_to_go_on_from([again, here, elsewhere], 9) == elsewhere


def test_of_a_container_with_its_hosts_name_no_process_is_known_to_be_dead() -> None:
    code = "from foxnas_mlflow.tracking.process import process_identity; print(process_identity())"
    inside = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code]
    done = subprocess.run(inside, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"needs namespaces: {done.stderr.strip()}")
    # It has ended, but nothing here can tell: its ids are not those that are seen here.
    assert done.stdout.split()[0] == process_identity().split()[0]
    assert not is_dead(done.stdout.strip())
