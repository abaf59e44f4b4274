"""Measuring on an Edge TPU, which a library with the interface of the real one stands in for."""

from __future__ import annotations

import fcntl
import re
from pathlib import Path

import pytest

from foxnas_mlflow.cli.main import main
from foxnas_mlflow.core.errors import ConversionError, DeviceError, InvalidInputError
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.space import TPU_SPACE
from foxnas_mlflow.core.targets import get_target
from foxnas_mlflow.devices import check, connect, host_answer, measure
from foxnas_mlflow.tflite import require_compiler, write_probe
from foxnas_mlflow.workflows._timers import open_device
from tests.measuring import SHORT

pytestmark = [pytest.mark.tflite, pytest.mark.usefixtures("edgetpu")]

SPACE = TPU_SPACE.replace(image_sizes=(32,), width_mult=0.25)


@pytest.fixture(scope="module")
def int8() -> bytes:
    return write_probe(build_network(SPACE, SPACE.smallest()), per_channel_dense=False)


def test_a_compiled_model_runs_there_and_answers_as_the_processor_does(int8: bytes) -> None:
    compiled = require_compiler().compile(int8)
    with connect("local") as connection:
        assert check(connection).edgetpu
        benchmark = measure(connection, compiled, edgetpu=True, expected=host_answer(int8), **SHORT)
    assert benchmark.edgetpu
    assert benchmark.output_difference == 0


def test_what_does_not_run_there_is_never_measured_as_if_it_did(int8: bytes) -> None:
    # The delegate would leave it to the processor, whose time would pass for the Edge TPU's.
    with connect("local") as connection, pytest.raises(InvalidInputError, match="runs only what was compiled for it"):
        measure(connection, int8, edgetpu=True)
    with connect("local") as connection, pytest.raises(InvalidInputError, match="runs only there"):
        measure(connection, require_compiler().compile(int8))


def test_no_device_and_no_library(int8: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = require_compiler().compile(int8)
    monkeypatch.setenv("STAND_IN_NO_DEVICE", "1")
    with connect("local") as connection:
        assert not check(connection).edgetpu
        with pytest.raises(DeviceError, match="plug it in"):
            measure(connection, compiled, edgetpu=True)
    monkeypatch.delenv("LD_LIBRARY_PATH")
    with connect("local") as connection, pytest.raises(DeviceError, match=r"needs the library libedgetpu\.so\.1"):
        measure(connection, compiled, edgetpu=True)


def test_a_library_for_another_runtime_is_told_by_check_too(int8: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """It loads and finds its device; the first interpreter that it takes an operator of crashes."""
    compiled = require_compiler().compile(int8)
    monkeypatch.setenv("STAND_IN_FOREIGN", "1")
    with connect("local") as connection:
        found = check(connection)
        assert not found.edgetpu
        (note,) = (note for note in found.notes if "its library crashes" in note)
        assert "signal 11" in note
        assert "tflite-runtime 2.5 to 2.11" in note
        assert "feranick/libedgetpu" in note
        with pytest.raises(
            DeviceError, match=r"must be one for its runtime; received signal 11; install .* 2\.11 alone"
        ):
            measure(connection, compiled, edgetpu=True)


def test_of_several_accelerators_one_is_named(int8: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = require_compiler().compile(int8)
    for name in ("usb:0", "usb:1"):
        (tmp_path / name).touch()
    monkeypatch.setenv("STAND_IN_STICKS", str(tmp_path))
    quick = {"edgetpu": True, **SHORT}
    with (tmp_path / "usb:0").open("rb+") as taken:
        fcntl.flock(taken, fcntl.LOCK_EX)
        with connect("local?edgetpu=usb:1") as connection:
            assert check(connection).edgetpu
            assert measure(connection, compiled, **quick).edgetpu
        for stick in ("usb:0", "usb:2"):
            with connect(f"local?edgetpu={stick}") as connection:
                assert not check(connection).edgetpu
            with (
                connect(f"local?edgetpu={stick}") as connection,
                pytest.raises(DeviceError, match=rf"received {stick}: .*no other process holds it; with several, name"),
            ):
                measure(connection, compiled, **quick)


def test_subnets_are_compiled_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_device(get_target("edgetpu"), SPACE, "local") as timer:
        timing = timer.time(SPACE.largest())
    assert timer.source == timing.source == "measured"
    assert timing.latency_ms > 0
    assert not any("differ from" in problem for problem in timing.problems), timing.problems
    monkeypatch.setenv("STAND_IN_MODE", "refused")
    with (
        open_device(get_target("edgetpu"), SPACE, "local") as timer,
        pytest.raises(ConversionError, match="Model not quantized"),
    ):
        timer.time(SPACE.smallest())


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("PATH", "/nonexistent", "must be compiled before an Edge TPU can run it"),
        (
            "STAND_IN_NO_DEVICE",
            "1",
            "none that answers on local.* libedgetpu1-std for tflite-runtime 2.5 to 2.11 alone",
        ),
    ],
    ids=["no compiler", "no device"],
)
def test_a_pipeline_begins_only_where_an_edge_tpu_can_be_measured(
    tracking: str,
    variable: str,
    value: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(variable, value)
    assert main(["main", "--target", "edgetpu", "--device", "local"]) == 2
    assert re.search(message, capsys.readouterr().err)
