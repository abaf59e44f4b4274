"""The one room that runs int8 models: who looks a runtime up, and that serving needs no TensorFlow."""

from __future__ import annotations

import ast
import fcntl
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foxnas_mlflow.core.errors import DeviceError, InvalidFormatError, InvalidInputError, MissingDependencyError
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.space import CPU_SPACE
from foxnas_mlflow.data import Normalization, evaluate
from foxnas_mlflow.runtime import RUNTIMES, ClassifierPool, open_interpreter, open_pool
from foxnas_mlflow.tflite import Int8Model, require_compiler, write_probe
from foxnas_mlflow.tflite import _int8 as int8_models
from tests.conftest import ROOT

NORMALIZATION = Normalization()


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    space = CPU_SPACE.replace(n_classes=5)
    path = tmp_path_factory.mktemp("probe") / "probe.tflite"
    path.write_bytes(write_probe(build_network(space, space.smallest(128))))
    return path


def opens_a_runtime(tree: ast.AST) -> bool:
    """Whether a module names the runtimes to import, or makes an interpreter or loads a delegate itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in {f"{name}.interpreter" for name in RUNTIMES}:
            return True
        if isinstance(node, ast.Attribute) and node.attr == "Interpreter":
            return True
    return False


def test_one_module_opens_interpreters() -> None:
    """The board's script travels alone to Python 3.7 and is the one other."""
    package = ROOT / "foxnas_mlflow"
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if opens_a_runtime(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == {"runtime.py", "devices/board.py"}


def test_one_module_counts_right_answers() -> None:
    """A threshold of rejection is chosen by which answers are right, in the core, which knows no images."""
    package = ROOT / "foxnas_mlflow"
    counters = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare) and any("argmax" in ast.dump(part) for part in ast.walk(node)):
                counters.add(path.relative_to(package).as_posix())
    assert counters == {"data/_answers.py", "core/rejection.py"}


def test_serving_loads_neither_tensorflow_nor_torch(probe: Path) -> None:
    code = (
        "import sys, numpy as np; from pathlib import Path; from foxnas_mlflow.runtime import Classifier;"
        "from foxnas_mlflow.data.preprocess import Normalization;"
        f"c = Classifier(Path({str(probe)!r}), Normalization()); c(np.zeros(c.input_shape, np.uint8));"
        "print(sorted({'tensorflow', 'torch', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_a_file_and_its_bytes_are_one_model(probe: Path, rng: np.random.Generator) -> None:
    images = rng.integers(0, 256, (3, 128, 128, 3), dtype=np.uint8)
    evaluated = Int8Model(probe.read_bytes(), normalization=NORMALIZATION)
    pool = ClassifierPool(probe, NORMALIZATION, "logits", size=1)
    with pool.lend() as classifier:
        served = [classifier.last_layer(image) for image in images]
        np.testing.assert_array_equal(evaluated.quantize(images), [classifier.quantize(image) for image in images])
    np.testing.assert_array_equal(evaluated.logits(images), served)
    with pytest.raises(InvalidInputError, match="must have 128 x 128 pixels"):
        evaluated.logits(images[:, :64])
    with pytest.raises(InvalidInputError, match="must be uint8"):
        evaluated.logits(images[:0])


def test_many_images_are_divided_among_interpreters_and_answered_in_their_order(
    probe: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = rng.integers(0, 256, (11, 128, 128, 3), dtype=np.uint8)
    alone = Int8Model(probe, normalization=NORMALIZATION)
    monkeypatch.setattr(int8_models, "n_processors", lambda: 3)
    monkeypatch.setattr(int8_models, "_PART_IMAGES", 3)
    np.testing.assert_array_equal(
        Int8Model(probe, normalization=NORMALIZATION).logits(images),
        np.concatenate([alone.logits(images[i : i + 1]) for i in range(len(images))]),
    )


def test_what_is_no_model_is_refused_with_its_name_only(tmp_path: Path) -> None:
    path = tmp_path / "broken.tflite"
    path.write_bytes(b"no model")
    with pytest.raises(InvalidFormatError, match=r"received broken\.tflite") as caught:
        open_interpreter(path)
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises(InvalidFormatError, match="that the runtime can open"):
        open_interpreter(b"no model")


def test_a_pool_falls_back_where_the_accelerator_is_missing(probe: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r"received libnone\.so"):
        open_pool(probe, None, NORMALIZATION, "logits", size=1, threads=1, delegate="/opt/libnone.so")
    with pytest.warns(UserWarning, match="running on the processor"):
        pool = open_pool(probe, probe, NORMALIZATION, "logits", size=1, threads=1, delegate="/opt/libnone.so")
    assert pool.input_shape == (128, 128, 3)


def test_a_stick_that_another_process_has_is_no_reason_to_answer_slowly(
    probe: Path, edgetpu_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_STICKS", str(tmp_path))
    (tmp_path / "usb:0").touch()
    library, compiled = str(edgetpu_directory / "libedgetpu.so.1"), tmp_path / "compiled.tflite"
    with (tmp_path / "usb:0").open("rb+") as taken:
        fcntl.flock(taken, fcntl.LOCK_EX)
        with pytest.raises(DeviceError, match=r"one process has it to itself, or have the processor answer.*delegate"):
            open_pool(compiled, probe, NORMALIZATION, "logits", size=1, threads=1, delegate=library)
    # Who asks for the processor gets it, from the twin: the compiled file runs on an Edge TPU alone.
    assert open_pool(compiled, probe, NORMALIZATION, "logits", size=1, threads=1, delegate="").input_shape[0] == 128


@pytest.mark.usefixtures("edgetpu")
def test_a_pool_finds_a_stick_again_that_was_unplugged(
    probe: Path, edgetpu_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_STICKS", str(tmp_path))
    stick, compiled = tmp_path / "usb:0", tmp_path / "compiled.tflite"
    stick.touch()
    compiled.write_bytes(require_compiler().compile(probe.read_bytes()))
    library, image = str(edgetpu_directory / "libedgetpu.so.1"), np.zeros((128, 128, 3), np.uint8)
    pool = open_pool(compiled, probe, NORMALIZATION, "logits", size=1, threads=1, delegate=library)

    def answer() -> list[float]:
        with pool.lend() as classifier:
            values: list[float] = classifier.last_layer(image).tolist()
            return values

    before = answer()
    stick.unlink()
    with pytest.raises(RuntimeError):
        answer()
    with pytest.raises(DeviceError):
        answer()
    stick.touch()
    assert answer() == before


def test_a_place_that_cannot_be_filled_keeps_nobody_from_who_is_idle(
    probe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = ClassifierPool(probe, NORMALIZATION, "logits", size=2)
    lent = pool.lend()
    warm = lent.__enter__()

    def fails() -> None:
        # Meanwhile the other one is given back.
        lent.__exit__(None, None, None)
        raise DeviceError("a stick must answer")

    monkeypatch.setattr(pool, "_open", fails)
    with pytest.raises(DeviceError), pool.lend():
        pytest.fail("there was another one")
    for _ in range(2):
        with pool.lend() as classifier:
            assert classifier is warm


def test_threads_share_a_pool_and_get_the_answers_of_one(probe: Path, rng: np.random.Generator) -> None:
    images = rng.integers(0, 256, (8, 128, 128, 3), dtype=np.uint8)
    expected = Int8Model(probe, normalization=NORMALIZATION).logits(images)
    pool = ClassifierPool(probe, NORMALIZATION, "logits", size=2)
    got: dict[int, Any] = {}

    def answer(i: int) -> None:
        with pool.lend() as classifier:
            got[i] = classifier.last_layer(images[i])

    threads = [threading.Thread(target=answer, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(np.stack([got[i] for i in range(8)]), expected)


def test_networks_are_counted_on_the_same_images_read_once() -> None:
    reads = []

    def batches() -> Any:
        for targets in ([0, 1, 2], [2, 2]):
            reads.append(targets)
            yield np.eye(3)[targets], np.array(targets)

    right, zero = evaluate(batches(), lambda images: images, lambda images: np.zeros((len(images), 3)))
    assert reads == [[0, 1, 2], [2, 2]]
    assert (right.top1_percent, right.standard_error, right.n_images) == (100.0, 0.0, 5)
    assert zero.correct.tolist() == [True, False, False, False, False]
    # Ties go to the first class; one standard error of a share of 1 in 5 is sqrt(.2 .8 / 5).
    assert zero.top1_percent == pytest.approx(20)
    assert zero.standard_error == pytest.approx(100 * (0.2 * 0.8 / 5) ** 0.5)
    with pytest.raises(InvalidInputError, match="at least one image"):
        evaluate(iter(()), lambda images: images)
