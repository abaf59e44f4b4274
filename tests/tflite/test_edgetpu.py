"""The Edge TPU without one: readiness, a stand-in compiler, real logs, and what is said where it is missing."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foxnas_mlflow.core.errors import ConversionError, DeviceError, MissingDependencyError
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.space import CPU_SPACE, TPU_SPACE, SearchSpace
from foxnas_mlflow.runtime import EDGETPU_DELEGATE, load_delegate, open_interpreter
from foxnas_mlflow.tflite import (
    EdgeTpuCompiler,
    edgetpu_readiness,
    find_compiler,
    parse_log,
    read_tflite,
    write_probe,
)
from foxnas_mlflow.tflite._edgetpu_compiler import INSTALL_HINT
from foxnas_mlflow.tflite._model import _schema, pack
from tests.edgetpu_stand_in import write_stand_in

from .conftest import SMALL_CPU, SMALL_TPU, sample_network

LOGS = Path(__file__).with_name("logs")


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EdgeTpuCompiler:
    write_stand_in(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = find_compiler()
    assert found is not None
    assert Path(found.command).parent == tmp_path
    return found


def probe(space: SearchSpace, size: int = 48, **options: Any) -> bytes:
    return write_probe(sample_network(space, size), per_channel_dense=False, **options)


def test_a_fully_mapped_log() -> None:
    report = parse_log((LOGS / "mapped.log").read_text())
    assert report.version == "16.0.384591198"
    assert report.metrics == {
        "edgetpu/operators_mapped": 191,
        "edgetpu/operators_unmapped": 0,
        "edgetpu/on_chip_used_bytes": 66 * 2**10,
        "edgetpu/on_chip_remaining_bytes": round(7.67 * 2**20),
        "edgetpu/off_chip_bytes": 0,
        "edgetpu/subgraphs": 1,
        "edgetpu/compile_ms": 98.0,
    }
    assert ("CONV_2D", 123) in {(row.operator, row.count) for row in report.operators}
    assert report.unmapped == ()


def test_a_log_with_operators_left_on_the_processor_and_streamed_weights() -> None:
    report = parse_log((LOGS / "streamed.log").read_text())
    assert (report.n_mapped, report.n_unmapped) == (83, 10)
    assert report.off_chip_bytes == round(1.22 * 2**20)
    assert report.on_chip_remaining_bytes == round(7.75 * 2**10)
    assert {(row.operator, row.status) for row in report.unmapped} == {
        ("LOGISTIC", "More than one subgraph is not supported"),
        ("CONCATENATION", "More than one subgraph is not supported"),
        ("QUANTIZE", "Operation is otherwise supported, but not mapped due to some unspecified limitation"),
    }


def test_a_log_without_its_table() -> None:
    report = parse_log((LOGS / "summary.log").read_text())
    assert (report.n_mapped, report.n_unmapped, report.operators) == (117, 48, ())


@pytest.mark.parametrize("line", ["Total number of operations", "Model compiled successfully", "On-chip memory used"])
def test_a_log_that_is_cut_is_refused(line: str) -> None:
    text = "\n".join(row for row in (LOGS / "mapped.log").read_text().splitlines() if line not in row)
    with pytest.raises(ConversionError, match="log must be that of a successful"):
        parse_log(text)


def test_a_compilation_is_judged_by_its_file_and_log(compiler: EdgeTpuCompiler) -> None:
    data = probe(SMALL_TPU)
    output = compiler.run(data)
    report = output.report()
    counts = read_tflite(data).operator_counts
    assert report.n_mapped == sum(counts.values())
    assert {row.operator: row.count for row in report.operators} == counts
    assert read_tflite(output.data).operator_counts == {"edgetpu-custom-op": 1}


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("refused", "must make a file; received Invalid model.*Model not quantized"),
        ("unmapped", "at least one operator"),
    ],
)
def test_a_failed_compilation_says_why(
    compiler: EdgeTpuCompiler, mode: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_MODE", mode)
    output = compiler.run(probe(SMALL_TPU))
    assert "Edge TPU Compiler version 16.0" in output.log
    with pytest.raises(ConversionError, match=message):
        output.report()


def test_a_part_that_stays_on_the_processor_is_named(
    compiler: EdgeTpuCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_MODE", "partly")
    (row,) = compiler.run(probe(SMALL_TPU)).report().unmapped
    assert (row.operator, row.count) == ("FULLY_CONNECTED", 1)


def test_a_compiler_that_does_not_end_is_stopped_with_its_children(
    compiler: EdgeTpuCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_MODE", "slow")
    monkeypatch.setenv("STAND_IN_PID", str(tmp_path / "pid"))
    monkeypatch.setattr("foxnas_mlflow.tflite._edgetpu_compiler._GRACE_S", 0)
    with pytest.raises(ConversionError, match="must end within 5 s"):
        compiler.run(probe(SMALL_TPU), timeout_s=5)
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 60
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_missing_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_compiler() is None
    with pytest.raises(DeviceError, match="this machine can run"):
        EdgeTpuCompiler(str(tmp_path / "edgetpu_compiler")).run(b"")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_missing_docker_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("docker")
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    with pytest.raises(DeviceError, match="Docker must be able to run") as caught:
        find_compiler("coral-compiler")
    message = str(caught.value)
    assert INSTALL_HINT in message
    assert "\n" not in message
    # Docker's client leaves a socket open when it finds no daemon; it is collected here, where that is expected.
    del caught
    gc.collect()


@pytest.mark.parametrize("space", [CPU_SPACE, TPU_SPACE])
def test_networks_of_both_spaces_are_ready(space: SearchSpace) -> None:
    """Squeeze-excite too: MEAN, 1x1 convolutions and MUL, all of them mapped operators."""
    for architecture in (space.smallest(), space.sample(np.random.default_rng(1), image_size=224)):
        model = read_tflite(write_probe(build_network(space, architecture), per_channel_dense=False))
        readiness = edgetpu_readiness(model)
        assert readiness.issues == ()
        assert readiness.ready
        assert readiness.metrics["edgetpu/operators_mappable"] == len(model.operators)


def test_weights_beyond_the_chip_are_named_but_do_not_stop_it() -> None:
    space = TPU_SPACE.replace(width_mult=1.5)
    readiness = edgetpu_readiness(
        read_tflite(write_probe(build_network(space, space.largest(128)), per_channel_dense=False))
    )
    assert readiness.ready
    (issue,) = readiness.issues
    assert not issue.blocking
    assert issue.layer.startswith(("stage", "tail", "head"))
    assert "more than the 6.90 MiB" in issue.reason


def altered(change: Callable[[Any, Any, Any], None], data: bytes | None = None) -> bytes:
    schema = _schema()
    model = schema.ModelT.InitFromPackedBuf(data or probe(SMALL_CPU), 0)
    change(schema, model, model.subgraphs[0])
    return pack(model)


def _version(schema: Any, model: Any, graph: Any) -> None:
    model.operatorCodes[0].version = 6


def _hard_swish(schema: Any, model: Any, graph: Any) -> None:
    code = model.operatorCodes[graph.operators[3].opcodeIndex]
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.HARD_SWISH


def _float_output(schema: Any, model: Any, graph: Any) -> None:
    graph.tensors[graph.outputs[0]].type = schema.TensorType.FLOAT32


def _dynamic_batch(schema: Any, model: Any, graph: Any) -> None:
    tensor = graph.tensors[graph.inputs[0]]
    tensor.shapeSignature = np.array([-1, *tensor.shape[1:]], np.int32)


def _batch(schema: Any, model: Any, graph: Any) -> None:
    tensor = graph.tensors[graph.inputs[0]]
    tensor.shape = np.array([2, *tensor.shape[1:]], np.int32)


def _dilation(schema: Any, model: Any, graph: Any) -> None:
    entry = next(o for o in graph.operators if hasattr(o.builtinOptions, "depthMultiplier"))
    entry.builtinOptions.dilationHFactor = entry.builtinOptions.dilationWFactor = 2


@pytest.mark.parametrize(
    ("change", "reason", "first"),
    [
        (_version, "version 6 of the operator is newer than the compiler's, 3", 0),
        (_hard_swish, "the operator is not supported", 3),
        (_float_output, "float32, not quantized to 8 bits", -1),
        (_dynamic_batch, "a size that is not fixed", 0),
        (_batch, "more than three dimensions above 1", 0),
        (_dilation, "a dilated depthwise convolution", 1),
    ],
)
def test_what_the_compiler_refuses_is_named(change: Any, reason: str, first: int) -> None:
    model = read_tflite(altered(change))
    readiness = edgetpu_readiness(model)
    assert not readiness.ready
    issue = readiness.issues[0]
    assert issue.blocking
    assert reason in issue.reason
    assert issue.layer
    assert readiness.n_mappable == (len(model.operators) - 1 if first < 0 else first)
    assert readiness.to_dict()["issues"][0]["reason"] == issue.reason


def test_dense_weights_with_a_scale_for_each_output_are_refused() -> None:
    model = read_tflite(write_probe(sample_network(SMALL_TPU, 48), per_channel_dense=True))
    (issue,) = edgetpu_readiness(model).issues
    assert issue.operator == "FULLY_CONNECTED"
    assert "one scale" in issue.reason


def test_a_missing_delegate_and_a_missing_device_say_so() -> None:
    with pytest.raises(MissingDependencyError, match=r"received libedgetpu\.so\.1; .*install its library"):
        open_interpreter(probe(SMALL_TPU), delegate=EDGETPU_DELEGATE)

    def no_device(library: str) -> None:
        raise ValueError("Failed to load delegate")

    with pytest.raises(DeviceError, match="must be connected"):
        load_delegate("libc.so.6", no_device)
