"""The 25 points that MLflow's own flavors and their tests agree on; `n` in a test's name is the point."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, Schema

import foxnas_mlflow.flavor as flavor
from foxnas_mlflow.core.cost import network_cost
from foxnas_mlflow.core.errors import InvalidFormatError, InvalidInputError
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.predictors import PredictorSet
from foxnas_mlflow.core.space import CPU_SPACE
from foxnas_mlflow.data.preprocess import decode_image
from foxnas_mlflow.flavor import KINDS, SubnetModel, SupernetModel, TfliteModel, load_model, log_model, save_model
from foxnas_mlflow.flavor._example import grey_png
from foxnas_mlflow.runtime import Classifier
from tests.colour_model import LABELS, PREPROCESSING, SIZE, encoded, image_of
from tests.servers import request, scoring_server

SAVED_KINDS = KINDS


def jpegs() -> list[bytes]:
    return [encoded(image_of(colour, seed=seed)) for seed in range(3) for colour in LABELS]


def native(model: TfliteModel, images: list[bytes]) -> np.ndarray:
    """The bare interpreter's answers."""
    classifier = Classifier(model.path, model.preprocessing.normalization, model.output)
    return np.stack([classifier(model.preprocessing.decode(image)) for image in images])


def probabilities(table: pd.DataFrame) -> np.ndarray:
    return np.array(table["probabilities"].tolist(), np.float32)


def requirements_of(path: Path) -> list[str]:
    return (path / "requirements.txt").read_text().split("\n")


def pip_section(path: Path) -> list[str]:
    conda = yaml.safe_load((path / "conda.yaml").read_text())
    return next(entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict))


# -- 1 to 3: name, requirements, environment -------------------------------------------------------


def test_01_flavor_name_and_docstring() -> None:
    assert flavor.FLAVOR_NAME == "foxnas"
    assert flavor.__doc__ is not None
    for kind in KINDS:
        assert kind in flavor.__doc__


@pytest.mark.parametrize("kind", KINDS)
def test_02_default_requirements_are_pinned_and_least(kind: str) -> None:
    requirements = flavor.get_default_pip_requirements(kind)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", requirement) for requirement in requirements)
    names = {requirement.split("==")[0].lower() for requirement in requirements}
    assert not names & {"tensorflow", "statsmodels", "mlflow"}
    assert ("torch" in names) == (kind == "supernet")
    assert ("ai-edge-litert" in names) == (kind in ("tflite", "edgetpu"))
    assert "torch" in " ".join(flavor.get_default_pip_requirements("subnet", weights=True))


@pytest.mark.parametrize("kind", KINDS)
def test_03_default_conda_env(kind: str) -> None:
    dependencies = flavor.get_default_conda_env(kind)["dependencies"]
    pip = next(entry["pip"] for entry in dependencies if isinstance(entry, dict))
    assert set(flavor.get_default_pip_requirements(kind)) <= set(pip)
    assert any(requirement.startswith("mlflow") for requirement in pip)


# -- 4 and 5: round trips --------------------------------------------------------------------------


def assert_same(loaded: Any, model: Any) -> None:
    assert type(loaded) is type(model)
    if isinstance(model, PredictorSet):
        architectures = [CPU_SPACE.smallest(192), CPU_SPACE.largest(192)]
        assert loaded.predict_table(architectures) == model.predict_table(architectures)
    elif isinstance(model, TfliteModel):
        assert loaded.path.read_bytes() == model.path.read_bytes()
        assert (loaded.labels, loaded.preprocessing, loaded.output) == (model.labels, model.preprocessing, model.output)
    else:
        assert loaded.space == model.space
        if isinstance(model, SubnetModel):
            assert (loaded.architecture, dict(loaded.details)) == (model.architecture, dict(model.details))
        else:
            assert dict(loaded.config) == dict(model.config)
        if model.weights is not None:
            assert set(loaded.weights) == set(model.weights)
            for name, array in model.weights.items():
                np.testing.assert_array_equal(loaded.weights[name], array)


@pytest.mark.parametrize("kind", SAVED_KINDS)
def test_04_save_and_load(kind: str, models: dict[str, Any], saved: dict[str, Path]) -> None:
    assert_same(load_model(str(saved[kind])), models[kind])


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("kind", SAVED_KINDS)
def test_05_log_and_load(tracking: str, kind: str, active: bool, models: dict[str, Any], tmp_path: Path) -> None:
    if active:
        with mlflow.start_run() as run:
            info = log_model(models[kind], name="model", kind=kind)
        assert info.run_id == run.info.run_id
    else:
        info = log_model(models[kind], name="model", kind=kind)
        mlflow.end_run()
    assert_same(load_model(info.model_uri, dst_path=str(tmp_path)), models[kind])


def test_05_weights_of_a_subnet_round_trip(subnet: SubnetModel, supernet: SupernetModel, tmp_path: Path) -> None:
    trained = SubnetModel(
        subnet.architecture, subnet.space, {}, supernet.weights, supernet.preprocessing, supernet.labels
    )
    save_model(trained, tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"))
    assert_same(loaded, trained)
    assert isinstance(loaded, SubnetModel)
    assert loaded.preprocessing == supernet.preprocessing
    assert Model.load(str(tmp_path / "model")).flavors["foxnas"]["weights"] == "trained"


# -- 6: signature x example ------------------------------------------------------------------------


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_06_signature_and_example(colour_model: TfliteModel, given: bool, example: bool, tmp_path: Path) -> None:
    table = pd.DataFrame({"image": jpegs()[:1]})
    save_model(
        colour_model,
        tmp_path / "model",
        signature=flavor.image_signature() if given else None,
        input_example=table if example else None,
    )
    model = Model.load(str(tmp_path / "model"))
    assert model.signature is not None
    assert model.signature.inputs.input_names() == ["image"]
    assert isinstance(model.signature.inputs.inputs[0], ColSpec) == given
    assert model.signature.params is not None
    loaded_example = model.load_input_example(str(tmp_path / "model"))
    predicted = mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(loaded_example)
    assert len(predicted) == 1
    if example:
        assert predicted["label"].tolist() == ["red"]


@pytest.mark.filterwarnings("ignore:running on the processor:UserWarning")
@pytest.mark.parametrize("kind", SAVED_KINDS)
def test_06_every_kind_declares_all_that_goes_in_and_comes_out(kind: str, saved: dict[str, Path]) -> None:
    path = str(saved[kind])
    description = Model.load(path)
    table = mlflow.pyfunc.load_model(path).predict(description.load_input_example(path))
    assert len(table) == 1
    assert description.signature is not None
    assert description.signature.outputs.input_names() == list(table)
    assert len(description.signature.inputs.inputs) == 1


def test_06_the_example_of_an_image_is_grey_and_of_its_size() -> None:
    for channels in (1, 3):
        image = decode_image(grey_png(40, channels), channels=channels)
        assert image.shape == (40, 40, channels)
        assert set(np.unique(image)) == {128}


def test_06_a_signature_of_one_s_own_is_kept(predictors: PredictorSet, tmp_path: Path) -> None:
    signature = ModelSignature(inputs=Schema([ColSpec("string", "architecture")]))
    save_model(predictors, tmp_path / "model", signature=signature)
    assert Model.load(str(tmp_path / "model")).signature == signature


# -- 7 to 11: predictions --------------------------------------------------------------------------


def test_07_pyfunc_equals_native_for_images(colour_model: TfliteModel, saved: dict[str, Path]) -> None:
    images = jpegs()
    table = mlflow.pyfunc.load_model(str(saved["tflite"])).predict(pd.DataFrame({"image": images}))
    np.testing.assert_array_equal(probabilities(table), native(colour_model, images))
    assert table["label"].tolist() == list(LABELS) * 3
    np.testing.assert_allclose(table["probability"], probabilities(table).max(axis=1))


def test_07_pyfunc_equals_native_for_predictors(predictors: PredictorSet, saved: dict[str, Path]) -> None:
    architectures = CPU_SPACE.sample(np.random.default_rng(0), image_size=192, n=5)
    frame = pd.DataFrame({"architecture": [a.to_json() for a in architectures]})
    model = mlflow.pyfunc.load_model(str(saved["predictors"]))
    for confidence in (0.5, 0.95):
        table = model.predict(frame, params={"confidence": confidence})
        expected = pd.DataFrame(predictors.predict_table(architectures, confidence))
        pd.testing.assert_frame_equal(table[expected.columns], expected)


def test_07_a_subnet_tells_what_is_known_of_it(subnet: SubnetModel, saved: dict[str, Path]) -> None:
    frame = pd.DataFrame({"architecture": [subnet.architecture.to_json()]})
    table = mlflow.pyfunc.load_model(str(saved["subnet"])).predict(frame)
    assert table.to_dict("records") == [
        {"architecture": subnet.architecture.to_json(), "predicted_accuracy": 71.5, "predicted_latency_ms": 42.0}
    ]


def test_07_a_supernet_counts_networks_of_its_space(supernet: SupernetModel, saved: dict[str, Path]) -> None:
    architectures = [CPU_SPACE.smallest(192), CPU_SPACE.largest(192)]
    model = mlflow.pyfunc.load_model(str(saved["supernet"]))
    table = model.predict(pd.DataFrame({"architecture": [a.to_json() for a in architectures]}))
    for i, architecture in enumerate(architectures):
        cost = network_cost(build_network(supernet.space, architecture))
        assert (table["params"][i], table["macs"][i]) == (cost.params, cost.macs)
    with pytest.raises(MlflowException, match="architecture"):
        model.predict(pd.DataFrame({"architecture": ["{}"]}))


@pytest.mark.filterwarnings("ignore:running on the processor:UserWarning")
@pytest.mark.parametrize("kind", SAVED_KINDS)
def test_07_every_kind_loads_as_pyfunc(kind: str, models: dict[str, Any], saved: dict[str, Path]) -> None:
    model = mlflow.pyfunc.load_model(str(saved[kind]))
    assert_same(model.get_raw_model(), models[kind])
    column = (
        {"image": jpegs()[:1]}
        if kind in ("tflite", "edgetpu")
        else {"architecture": [CPU_SPACE.smallest(192).to_json()]}
    )
    assert len(model.predict(pd.DataFrame(column))) == 1


@pytest.fixture(scope="module")
def served(saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One scoring server for the tests of this module."""
    log = tmp_path_factory.mktemp("serve") / "server.log"
    with scoring_server(str(saved["tflite"]), log=log) as url:
        yield url


def base64_of(image: bytes) -> str:
    import base64

    return base64.b64encode(image).decode()


@pytest.mark.server
def test_08_serve_and_score(colour_model: TfliteModel, served: str) -> None:
    images = jpegs()
    expected = native(colour_model, images)
    texts = [base64_of(image) for image in images]
    bodies: list[dict[str, Any]] = [
        {"dataframe_records": [{"image": text} for text in texts]},
        {"dataframe_split": {"columns": ["image"], "data": [[text] for text in texts]}},
        {"inputs": {"image": texts}},
        {"inputs": texts},
        {"instances": [{"image": text} for text in texts]},
    ]
    for body in bodies:
        status, text = request(served, body)
        assert status == 200, text
        rows = json.loads(text)["predictions"]
        np.testing.assert_allclose([row["probabilities"] for row in rows], expected, rtol=1e-6)
        assert [row["label"] for row in rows] == list(LABELS) * 3
    status, text = request(served, {**bodies[0], "params": {"top_k": 2, "threads": 1}})
    row = json.loads(text)["predictions"][0]
    assert row["top_labels"][0] == "red"
    assert len(row["top_probabilities"]) == 2


@pytest.mark.server
def test_08_serve_and_score_pixels(served: str, colour_model: TfliteModel) -> None:
    pixels = np.stack([image_of(colour, height=SIZE, width=SIZE) for colour in LABELS])
    classifier = Classifier(colour_model.path, PREPROCESSING.normalization, "logits")
    for body in ({"inputs": pixels.tolist()}, {"instances": (pixels / 255).tolist()}):
        status, text = request(served, body)
        assert status == 200, text
        got = [row["probabilities"] for row in json.loads(text)["predictions"]]
        np.testing.assert_allclose(got, [classifier(image) for image in pixels], rtol=1e-6)


@pytest.mark.server
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"dataframe_records": [{"image": "bm90IGFuIGltYWdl"}]}, "must be JPEG, PNG"),
        ({"dataframe_records": [{"image": "%%%"}]}, "base64"),
        ({"dataframe_records": [{"picture": "aGk="}]}, "Model is missing inputs ['image']"),
        ({"inputs": np.zeros((1, 8, 8, 3)).tolist()}, "must have the shape (32, 32, 3)"),
        ({"inputs": np.ones((1, SIZE, SIZE, 3), int).tolist()}, "whole numbers of which none is above 1"),
        ({"inputs": np.full((1, SIZE, SIZE, 3), -5).tolist()}, "uint8 in 0..255 or float in 0..1"),
        ({"inputs": np.full((1, SIZE, SIZE, 3), 17.5).tolist()}, "uint8 in 0..255 or float in 0..1"),
        ({"inputs": [["a"]]}, "shape"),
    ],
)
def test_08_a_server_refuses_in_one_clean_line(served: str, body: dict[str, Any], words: str) -> None:
    status, text = request(served, body)
    assert status == 400
    answer = json.loads(text)
    assert words in answer["message"]
    assert "stack_trace" not in answer
    assert "/" not in re.sub(r"'image': '[^']*'", "", answer["message"]).split("Error:")[-1]
    assert "Traceback" not in text
    assert str(Path(sys.prefix)) not in text


def test_09_table_array_and_mapping(colour_model: TfliteModel, saved: dict[str, Path]) -> None:
    model = mlflow.pyfunc.load_model(str(saved["tflite"]))
    pixels = np.stack([image_of(colour, height=SIZE, width=SIZE) for colour in LABELS])
    expected = model.predict(pixels)
    assert expected["label"].tolist() == list(LABELS)
    for same in ({"image": pixels}, pixels.astype(np.int64)):
        pd.testing.assert_frame_equal(model.predict(same), expected)
    # A file is prepared as in training: scaled, and its centre cut out.
    files = [encoded(image, "PNG") for image in pixels]
    for column in (files, [base64_of(file) for file in files]):
        table = model.predict(pd.DataFrame({"image": column}))
        np.testing.assert_array_equal(probabilities(table), native(colour_model, files))
    # What the wrapper takes where MLflow enforces nothing.
    own = loaded_wrapper(saved)
    for same in (
        {"image": list(pixels)},
        pd.DataFrame({"image": list(pixels)}),
        [image.tolist() for image in pixels],
    ):
        pd.testing.assert_frame_equal(own.predict(same), expected)
    floats = model.predict(pixels / np.float32(255))
    np.testing.assert_allclose(probabilities(floats), probabilities(expected), atol=1e-6)
    png = model.predict(pd.DataFrame({"image": [base64_of(jpegs()[0]), bytearray(jpegs()[1])]}))
    assert png["label"].tolist() == ["red", "green"]
    assert len(model.predict(pixels[:0])) == 0


def test_09_base64_as_people_have_it(saved: dict[str, Path]) -> None:
    import base64

    # Bytes whose base64 has '+', '/' and padding.
    image = next(
        data
        for data in (encoded(image_of("green", seed=seed)) for seed in range(99))
        if {"+", "/", "="} <= set(base64_of(data))
    )
    text = base64_of(image)
    same = [
        text,
        f"data:image/jpeg;base64,{text}",
        base64.urlsafe_b64encode(image).decode(),
        base64.urlsafe_b64encode(image).decode().rstrip("="),
        "\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
    ]
    model = mlflow.pyfunc.load_model(str(saved["tflite"]))
    got = model.predict(pd.DataFrame({"image": same}))
    assert len({tuple(row) for row in got["probabilities"]}) == 1
    assert set(got["label"]) == {"green"}
    with pytest.raises(MlflowException, match="must be base64"):
        model.predict(pd.DataFrame({"image": ["data:image/jpeg,%FF%D8"]}))


def test_09_a_forked_process_answers(saved: dict[str, Path]) -> None:
    program = (
        "import os, sys, warnings\n"
        "import mlflow, numpy\n"
        "warnings.simplefilter('ignore', DeprecationWarning)\n"
        "model = mlflow.pyfunc.load_model(sys.argv[1])\n"
        f"images = numpy.random.default_rng(0).integers(0, 256, (2, {SIZE}, {SIZE}, 3)).astype('uint8')\n"
        "before = model.predict(images)\n"
        "child = os.fork()\n"
        "after = model.predict(images)\n"
        "assert after.equals(before)\n"
        "if child == 0:\n"
        "    os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(saved["tflite"])], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "7", done.stderr


def test_09_a_forked_process_answers_two_requests_that_come_at_once(
    saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one comes while the first one opens what the process needs of its own."""
    wrapper = loaded_wrapper(saved)
    pixels = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    opening, go_on, of_the_parent = threading.Event(), threading.Event(), wrapper._pools
    open_pool = wrapper._open

    def slowly(threads: int) -> Any:
        opening.set()
        assert go_on.wait(60)
        return open_pool(threads)

    def pool(threads: int) -> Any:
        assert wrapper._pools is not of_the_parent
        return wrapper._pools[threads]

    monkeypatch.setattr(wrapper, "_open", slowly)
    monkeypatch.setattr(wrapper, "_pool", pool)
    # As in the child of a fork.
    monkeypatch.setattr(os, "getpid", lambda: 2**31 - 1)
    with ThreadPoolExecutor(2) as requests:
        first = requests.submit(wrapper.predict, pixels)
        assert opening.wait(60)
        second = requests.submit(wrapper.predict, pixels)
        with pytest.raises(TimeoutError):
            second.result(0.2)
        go_on.set()
        assert first.result(60).equals(second.result(60))


def loaded_wrapper(saved: dict[str, Path]) -> Any:
    """What MLflow calls once it has enforced the signature."""
    return flavor._load_pyfunc(str(saved["tflite"] / "data"))


def test_09_predictors_take_tables_and_mappings(saved: dict[str, Path]) -> None:
    model = mlflow.pyfunc.load_model(str(saved["predictors"]))
    text = CPU_SPACE.smallest(192).to_json()
    tables = [model.predict(x) for x in (pd.DataFrame({"architecture": [text]}), {"architecture": text})]
    pd.testing.assert_frame_equal(*tables)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (np.zeros((SIZE, SIZE, 3), np.uint8), "one image batch"),
        (np.zeros((1, 31, SIZE, 3), np.uint8), r"must have the shape \(32, 32, 3\)"),
        (np.zeros((1, 3, SIZE, SIZE), np.uint8), r"received shape \(3, 32, 32\)"),
        (pd.DataFrame({"picture": [b""]}), "column 'image'"),
        (pd.DataFrame({"image": [[[1, 2], [3]]]}), "rectangular"),
        (pd.DataFrame({"image": [None]}), "bytes, base64 text or an array"),
        (5, "must be a table"),
    ],
)
def test_10_wrong_shape_is_a_clear_error(saved: dict[str, Path], wrong: Any, words: str) -> None:
    with pytest.raises(MlflowException, match=words):
        loaded_wrapper(saved).predict(wrong)


def png_header(width: int, height: int, depth: int = 8) -> bytes:
    """A PNG that claims a size, and has almost nothing of it."""
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


UNTRUSTED = {
    "empty": (b"", "must be JPEG, PNG"),
    "truncated JPEG": (jpegs()[0][:-40], "must be whole and undamaged"),
    "truncated PNG": (encoded(image_of("red"), "PNG")[:200], "must be whole and undamaged"),
    "another format": (encoded(image_of("red"), "PPM"), "must be JPEG, PNG"),
    "floats": (encoded(np.zeros((9, 9), np.float32), "TIFF"), "has 8 or 16 bits a channel"),
    "above the limit": (png_header(8000, 6000), "at most 40000000 pixels; received 8000 x 6000"),
    "far above the limit": (png_header(60_000, 60_000), "at most 40000000 pixels"),
    "a line": (encoded(np.zeros((1, 60_000), np.uint8), "PNG"), "received 60000 x 1"),
}


@pytest.mark.parametrize("name", UNTRUSTED)
def test_10_untrusted_images_are_refused(saved: dict[str, Path], name: str) -> None:
    data, words = UNTRUSTED[name]
    model = mlflow.pyfunc.load_model(str(saved["tflite"]))
    for text_or_bytes in (data, base64_of(data)):
        with pytest.raises(MlflowException, match=words) as caught:
            model.predict(pd.DataFrame({"image": [text_or_bytes]}))
        assert len(str(caught.value).splitlines()) == 1
        assert str(saved["tflite"]) not in str(caught.value)


def test_10_the_limit_of_pixels_is_the_model_s(saved: dict[str, Path]) -> None:
    image = encoded(image_of("red", height=100, width=60))
    for limit, words in ((6000, None), (5999, "at most 5999 pixels; received 60 x 100")):
        model = mlflow.pyfunc.load_model(str(saved["tflite"]), model_config={"max_pixels": limit})
        if words is None:
            assert model.predict(pd.DataFrame({"image": [image]}))["label"].tolist() == ["red"]
        else:
            with pytest.raises(MlflowException, match=words):
                model.predict(pd.DataFrame({"image": [image]}))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64])
def test_11_whole_numbers_are_cast(saved: dict[str, Path], dtype: Any) -> None:
    model = mlflow.pyfunc.load_model(str(saved["tflite"]))
    pixels = image_of("blue", height=SIZE, width=SIZE)[None]
    pd.testing.assert_frame_equal(model.predict(pixels.astype(dtype)), model.predict(pixels))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_11_floats_are_cast(saved: dict[str, Path], dtype: Any) -> None:
    model = mlflow.pyfunc.load_model(str(saved["tflite"]))
    pixels = image_of("blue", height=SIZE, width=SIZE)[None]
    got = model.predict((pixels / 255).astype(dtype))
    # Half precision moves a pixel by at most one quantization level.
    np.testing.assert_allclose(probabilities(got), probabilities(model.predict(pixels)), atol=2e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((1, SIZE, SIZE, 3), np.int8),
        np.full((1, SIZE, SIZE, 3), -128.0),
        np.full((1, SIZE, SIZE, 3), 200.0),
        np.full((1, SIZE, SIZE, 3), np.nan),
        np.full((1, SIZE, SIZE, 3), 300),
        np.eye(SIZE, dtype=np.int64)[None, :, :, None].repeat(3, 3),
        np.eye(SIZE, dtype=np.uint8)[None, :, :, None].repeat(3, 3),
        np.zeros((1, SIZE, SIZE, 3), bool),
        np.zeros((1, SIZE, SIZE, 3), complex),
    ],
    ids=[
        "int8",
        "int8-looking float",
        "0..255 float",
        "nan",
        "above 255",
        "0 and 1",
        "0 and 1 as uint8",
        "bool",
        "complex",
    ],
)
def test_11_wrong_dtype_raises(saved: dict[str, Path], wrong: np.ndarray) -> None:
    with pytest.raises(MlflowException, match=r"uint8 in 0\.\.255 or float in 0\.\.1"):
        mlflow.pyfunc.load_model(str(saved["tflite"])).predict(wrong)


@pytest.mark.parametrize("params", [{"top_k": 0}, {"top_k": 4}, {"threads": -1}, {"threads": 10**6}])
def test_11_params_out_of_range_are_refused(saved: dict[str, Path], params: dict[str, int]) -> None:
    with pytest.raises(MlflowException, match="must be an integer from"):
        mlflow.pyfunc.load_model(str(saved["tflite"])).predict(pd.DataFrame({"image": jpegs()[:1]}), params=params)


# -- 12 and 13: registration -----------------------------------------------------------------------


def test_12_registers(tracking: str, subnet: SubnetModel) -> None:
    info = log_model(subnet, name="subnet", registered_model_name="foxnas-subnet-rpi4")
    mlflow.end_run()
    assert info.registered_model_version == 1
    assert_same(load_model("models:/foxnas-subnet-rpi4/1"), subnet)


def test_13_registers_nothing_unasked(tracking: str, subnet: SubnetModel) -> None:
    log_model(subnet, name="subnet")
    mlflow.end_run()
    assert mlflow.MlflowClient().search_registered_models() == []


# -- 14 to 19: environments ------------------------------------------------------------------------


@pytest.mark.parametrize("as_file", [True, False])
def test_14_15_conda_env_given(subnet: SubnetModel, as_file: bool, tmp_path: Path) -> None:
    environment = flavor.get_default_conda_env("subnet")
    environment["dependencies"][-1]["pip"].append("six==1.17.0")
    given: Any = environment
    if as_file:
        given = str(tmp_path / "env.yaml")
        Path(given).write_text(yaml.safe_dump(environment))
    save_model(subnet, tmp_path / "model", conda_env=given)
    assert yaml.safe_load((tmp_path / "model" / "conda.yaml").read_text()) == environment


@pytest.mark.parametrize("kind", SAVED_KINDS)
def test_16_requirements_match_conda(saved: dict[str, Path], kind: str) -> None:
    assert sorted(requirements_of(saved[kind])) == sorted(pip_section(saved[kind]))
    # As MLflow itself writes them, which compares them with all that is installed first.
    requirements = flavor.get_default_pip_requirements(kind)
    environment, written, _ = mlflow.utils.environment._process_pip_requirements(requirements)
    assert requirements_of(saved[kind]) == written
    assert yaml.safe_load((saved[kind] / "conda.yaml").read_text()) == environment


def test_17_pip_requirements(subnet: SubnetModel, tmp_path: Path) -> None:
    listed, file = tmp_path / "list", tmp_path / "r.txt"
    file.write_text("six==1.17.0")
    constraint = tmp_path / "c.txt"
    constraint.write_text("six<2")
    save_model(subnet, listed, pip_requirements=["six==1.17.0"])
    save_model(subnet, tmp_path / "file", pip_requirements=str(file))
    save_model(subnet, tmp_path / "both", pip_requirements=[f"-r {file}", f"-c {constraint}"])
    for path in (listed, tmp_path / "file", tmp_path / "both"):
        names = requirements_of(path)
        assert "six==1.17.0" in names
        assert not any(name.startswith("numpy") for name in names)
    assert "-c constraints.txt" in requirements_of(tmp_path / "both")
    assert (tmp_path / "both" / "constraints.txt").read_text() == "six<2"


def test_18_extra_pip_requirements(subnet: SubnetModel, tmp_path: Path) -> None:
    file, constraint = tmp_path / "r.txt", tmp_path / "c.txt"
    file.write_text("six==1.17.0")
    constraint.write_text("six<2")
    save_model(subnet, tmp_path / "list", extra_pip_requirements=["six==1.17.0"])
    save_model(subnet, tmp_path / "file", extra_pip_requirements=str(file))
    save_model(subnet, tmp_path / "both", extra_pip_requirements=[f"-r {file}", f"-c {constraint}"])
    for name in ("list", "file", "both"):
        assert {"six==1.17.0", *flavor.get_default_pip_requirements("subnet")} <= set(requirements_of(tmp_path / name))
    assert (tmp_path / "both" / "constraints.txt").read_text() == "six<2"


@pytest.mark.parametrize("kind", SAVED_KINDS)
def test_19_default_environment(saved: dict[str, Path], kind: str) -> None:
    expected = [*flavor.get_default_pip_requirements(kind), f"mlflow=={mlflow.__version__}"]
    assert sorted(requirements_of(saved[kind])) == sorted(expected)


# -- 20 and 21: code, python environment, metadata, options ----------------------------------------


def test_20_code_paths(subnet: SubnetModel, saved: dict[str, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(saved["subnet"] / "code" / "foxnas_mlflow.zip") as archive:
        names = archive.namelist()
        package = Path(flavor.__file__).parents[1]
        assert archive.read("foxnas_mlflow/flavor/_files.py") == (package / "flavor" / "_files.py").read_bytes()
    assert "foxnas_mlflow/reference/rpi4.json" in names
    assert (
        len(names)
        == len(set(names))
        == sum(1 for _ in package.rglob("*.py"))
        + sum(1 for pattern in ("*.json", "*.typed") for _ in package.rglob(pattern))
    )
    # The same code gives the same bytes.
    code = [(saved[kind] / "code" / "foxnas_mlflow.zip").read_bytes() for kind in KINDS]
    assert len(set(code)) == 1
    own = tmp_path / "own_module_of_this_test.py"
    own.write_text("VALUE = 7\n")
    save_model(subnet, tmp_path / "own", code_paths=[str(own)])
    assert Model.load(str(tmp_path / "own")).flavors["foxnas"]["code"] == "code"
    load_model(str(tmp_path / "own"))
    import own_module_of_this_test  # type: ignore[import-not-found]

    assert own_module_of_this_test.VALUE == 7
    assert Path(own_module_of_this_test.__file__).is_relative_to(tmp_path / "own" / "code")
    save_model(subnet, tmp_path / "none", code_paths=[])
    assert not (tmp_path / "none" / "code").exists()


@pytest.mark.parametrize("kind", SAVED_KINDS)
@pytest.mark.filterwarnings("ignore:running on the processor:UserWarning")
def test_20_code_that_runs_already_is_not_looked_for_again(saved: dict[str, Path], kind: str) -> None:
    before = list(sys.path)
    load_model(str(saved[kind]))
    assert sys.path == before
    mlflow.pyfunc.load_model(str(saved[kind]))
    assert sys.path == before


def test_20_a_model_carries_the_code_that_runs_it(saved: dict[str, Path], tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys, importlib.util, pathlib\n"
        "sys.path = [p for p in sys.path if not pathlib.Path(p, 'foxnas_mlflow').exists()]\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "assert importlib.util.find_spec('foxnas_mlflow') is None\n"
        "import mlflow, pandas\n"
        "model = mlflow.pyfunc.load_model(%r)\n"
        "table = model.predict(pandas.DataFrame({'image': [pathlib.Path(%r).read_bytes()]}))\n"
        "heavy = {'torch', 'tensorflow', 'statsmodels', 'sklearn'} & set(sys.modules)\n"
        "print(table.label[0], sys.modules['foxnas_mlflow'].__file__, sorted(heavy))\n"
    )
    image = tmp_path / "image.jpg"
    image.write_bytes(jpegs()[2])
    result = subprocess.run(
        [sys.executable, "-c", code % (str(saved["tflite"]), str(image))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    assert result.returncode == 0, result.stderr
    label, file, heavy = result.stdout.split()[-3:]
    assert label == "blue"
    assert file.startswith(str(saved["tflite"] / "code"))
    assert heavy == "[]"


@pytest.mark.parametrize("kind", SAVED_KINDS)
def test_21_python_env_is_valid(saved: dict[str, Path], kind: str) -> None:
    environment = yaml.safe_load((saved[kind] / "python_env.yaml").read_text())
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["dependencies"] == ["-r requirements.txt"]


def test_21_metadata_round_trips(subnet: SubnetModel, tmp_path: Path) -> None:
    save_model(subnet, tmp_path / "model", metadata={"owner": "vision", "numbers": [1, 2]})
    assert Model.load(str(tmp_path / "model")).metadata == {"owner": "vision", "numbers": [1, 2]}
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    assert loaded.metadata.metadata == {"owner": "vision", "numbers": [1, 2]}


def test_21_options_reach_the_interpreter(
    colour_model: TfliteModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ai_edge_litert.interpreter

    seen: list[dict[str, Any]] = []
    real = ai_edge_litert.interpreter.Interpreter

    class Recording(real):  # type: ignore[misc, valid-type]
        def __init__(self, **kwargs: Any) -> None:
            seen.append(kwargs)
            super().__init__(**kwargs)

    monkeypatch.setattr(ai_edge_litert.interpreter, "Interpreter", Recording)
    save_model(colour_model, tmp_path / "model", model_config={"threads": 2})
    seen.clear()
    mlflow.pyfunc.load_model(str(tmp_path / "model"))
    assert [call["num_threads"] for call in seen] == [2]
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"), model_config={"threads": 3, "pool_size": 1})
    assert seen[-1]["num_threads"] == 3
    model.predict(pd.DataFrame({"image": jpegs()[:2]}), params={"threads": 1})
    assert seen[-1]["num_threads"] == 1
    assert len(seen) == 3
    with pytest.raises(InvalidInputError, match="only the keys"):
        save_model(colour_model, tmp_path / "other", model_config={"thread": 2})


# -- 22: description -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SAVED_KINDS)
def test_22_mlmodel_describes_the_model(saved: dict[str, Path], kind: str) -> None:
    import hashlib

    model = Model.load(str(saved[kind]))
    configuration = model.flavors["foxnas"]
    assert configuration["kind"] == kind
    assert configuration["data"] == "data"
    assert configuration["code"] == "code/foxnas_mlflow.zip"
    assert configuration["format"] == flavor.MODEL_FORMAT
    main = {
        "supernet": "weights.safetensors",
        "predictors": "predictors.json",
        "subnet": "architecture.json",
        "tflite": "model.tflite",
        "edgetpu": "model_edgetpu.tflite",
    }[kind]
    digest = hashlib.sha256((saved[kind] / "data" / main).read_bytes()).hexdigest()
    assert configuration["sha256"] == digest
    assert configuration["weights"] == ("trained" if kind in ("supernet", "tflite", "edgetpu") else "none")
    assert model.flavors["python_function"]["loader_module"] == "foxnas_mlflow.flavor"
    if kind in ("tflite", "edgetpu"):
        assert configuration["quantization"]["input_dtype"] == "int8"
        assert configuration["quantization"]["input_scale"] > 0
        assert configuration["runtime"]["threads"] == 1
    described = {"MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "foxnas.json"}
    size = sum(f.stat().st_size for f in saved[kind].rglob("*") if f.is_file() and f.name not in described)
    assert model.model_size_bytes == size


@pytest.mark.parametrize("kind", SAVED_KINDS)
def test_22_a_model_is_few_files_and_all_are_in_its_manifest(saved: dict[str, Path], kind: str) -> None:
    import hashlib

    files = {f.relative_to(saved[kind]).as_posix(): f for f in saved[kind].rglob("*") if f.is_file()}
    assert len(files) <= 12
    manifest = flavor.read_manifest(saved[kind] / "data")
    listed = {f"data/{name}": digest for name, digest in manifest.files.items()} | dict(manifest.model_files)
    assert {*listed, "data/foxnas.json"} == set(files)
    for path, digest in listed.items():
        assert hashlib.sha256(files[path].read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("file", ["MLmodel", "code/foxnas_mlflow.zip", "conda.yaml", "data/model.tflite"])
def test_22_a_changed_file_is_refused(saved: dict[str, Path], tmp_path: Path, file: str) -> None:
    shutil.copytree(saved["tflite"], tmp_path / "model")
    with (tmp_path / "model" / file).open("ab") as opened:
        opened.write(b"\n")
    with pytest.raises(InvalidFormatError, match=f"{Path(file).name} changed or missing"):
        load_model(str(tmp_path / "model"))


@pytest.mark.parametrize("file", ["data/weights.safetensors", "code/numpy.py"])
def test_22_a_file_that_was_not_logged_is_refused(saved: dict[str, Path], tmp_path: Path, file: str) -> None:
    shutil.copytree(saved["tflite"], tmp_path / "model")
    (tmp_path / "model" / file).write_text("")
    with pytest.raises(InvalidFormatError, match="which was not logged"):
        load_model(str(tmp_path / "model"))


def rewritten(source: Path, target: Path, change: Any) -> Path:
    """A copy of a saved model whose foxnas.json was changed."""
    shutil.copytree(source, target)
    file = target / "data" / "foxnas.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    return target


@pytest.mark.parametrize("kind", ["predictors", "subnet"])
def test_22_format_1_is_still_read(kind: str, models: dict[str, Any], saved: dict[str, Path], tmp_path: Path) -> None:
    def to_format_1(manifest: dict[str, Any]) -> None:
        manifest["format"] = 1
        del manifest["metadata"], manifest["model_files"]

    assert_same(load_model(str(rewritten(saved[kind], tmp_path / "old", to_format_1))), models[kind])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": flavor.MODEL_FORMAT + 1}, r"format from 1 to .* a later one"),
        ({"format": True}, "format from 1 to"),
        ({"kind": "onnx"}, "kind must be one of"),
        ({"surprise": 1}, "exactly the keys"),
        ({"files": {"../foxnas.json": "0" * 64}}, "changed or missing"),
        ({"files": {"model.tflite": "0" * 64}}, r"model\.tflite changed or missing"),
        ({"files": {"gone.json": "0" * 64}}, r"gone\.json changed or missing"),
    ],
)
def test_22_a_description_that_cannot_be_trusted(
    saved: dict[str, Path], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    path = str(rewritten(saved["tflite"], tmp_path / "model", lambda manifest: manifest.update(change)))
    with pytest.raises(InvalidFormatError, match=words):
        load_model(path)
    with pytest.raises(MlflowException, match=words):
        mlflow.pyfunc.load_model(path)


# -- 23: MLflow 3 ----------------------------------------------------------------------------------


def test_23_logged_model_arguments(tracking: str, subnet: SubnetModel) -> None:
    with mlflow.start_run():
        info = log_model(
            subnet, name="subnet", params={"space": "cpu"}, tags={"team": "a"}, model_type="architecture", step=3
        )
        mlflow.log_metric("search/predicted_accuracy", 71.5, model_id=info.model_id)
    logged = mlflow.get_logged_model(info.model_id)
    assert logged.status == "READY"
    assert (logged.params["space"], logged.tags["team"], logged.model_type) == ("cpu", "a", "architecture")
    assert [(m.key, m.value) for m in logged.metrics or []] == [("search/predicted_accuracy", 71.5)]


def test_23_an_initialised_model_is_filled(tracking: str, subnet: SubnetModel) -> None:
    started = mlflow.initialize_logged_model(name="subnet")
    info = log_model(subnet, name="subnet", model_id=started.model_id)
    mlflow.end_run()
    assert info.model_id == started.model_id
    assert mlflow.get_logged_model(started.model_id).status == "READY"


# -- 24: refusals and extra files ------------------------------------------------------------------


def test_24_extra_files(subnet: SubnetModel, tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("measured on a board")
    save_model(subnet, tmp_path / "model", extra_files=[str(note)])
    assert (tmp_path / "model" / "extra_files" / "note.txt").read_text() == "measured on a board"
    assert Model.load(str(tmp_path / "model")).flavors["foxnas"]["extra_files"] == [{"path": "extra_files/note.txt"}]


def test_24_refusals(subnet: SubnetModel, predictors: PredictorSet, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(MlflowException, match="not empty"):
        save_model(subnet, tmp_path / "full")
    with pytest.raises(ValueError, match="Only one of"):
        save_model(subnet, tmp_path / "model", conda_env={}, pip_requirements=["six"])
    with pytest.raises(InvalidInputError, match="kind must be one of"):
        save_model(subnet, tmp_path / "model", kind="onnx")
    with pytest.raises(InvalidInputError, match="needs a TfliteModel"):
        save_model(subnet, tmp_path / "model2", kind="tflite")
    with pytest.raises(InvalidInputError, match="needs a SubnetModel"):
        save_model(predictors, tmp_path / "model3", kind="subnet")


def test_24_a_network_that_contradicts_its_description(colour_model: TfliteModel, tmp_path: Path) -> None:
    import dataclasses

    with pytest.raises(InvalidInputError, match="one label for each output"):
        save_model(dataclasses.replace(colour_model, labels=("a", "b")), tmp_path / "a")
    larger = dataclasses.replace(colour_model.preprocessing, image_size=64)
    with pytest.raises(InvalidInputError, match="what its preprocessing makes"):
        save_model(dataclasses.replace(colour_model, preprocessing=larger), tmp_path / "b")
    pairs = tmp_path / "pairs.tflite"
    one, two = (struct.pack("<5i", 4, n, 32, 32, 3) for n in (1, 2))
    pairs.write_bytes(colour_model.path.read_bytes().replace(one, two))
    with pytest.raises(InvalidInputError, match="one image at a time; received a fixed batch of 2"):
        save_model(dataclasses.replace(colour_model, path=pairs), tmp_path / "e")
    broken = tmp_path / "broken.tflite"
    broken.write_bytes(b"TFL3" + b"\0" * 100)
    with pytest.raises(InvalidFormatError, match="can open"):
        save_model(dataclasses.replace(colour_model, path=broken), tmp_path / "c")
    with pytest.raises(InvalidInputError, match="exists"):
        save_model(dataclasses.replace(colour_model, path=tmp_path / "none.tflite"), tmp_path / "d")


# -- 25: concurrency and delegates -----------------------------------------------------------------


def test_25_right_answers_under_eight_threads(colour_model: TfliteModel, saved: dict[str, Path]) -> None:
    model = mlflow.pyfunc.load_model(str(saved["tflite"]), model_config={"pool_size": 3})
    images = [encoded(image_of(LABELS[i % 3], seed=i)) for i in range(24)]
    expected = native(colour_model, images)
    assert len({row.tobytes() for row in expected}) == len(images)

    def client(k: int) -> bool:
        own = images[3 * k : 3 * k + 3]
        for _ in range(20):
            got = probabilities(model.predict(pd.DataFrame({"image": own})))
            if not np.array_equal(got, expected[3 * k : 3 * k + 3]):
                return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(client, range(8)))


@pytest.mark.server
def test_25_right_answers_under_eight_clients(colour_model: TfliteModel, served: str) -> None:
    images = [encoded(image_of(LABELS[i % 3], seed=i)) for i in range(8)]
    expected = native(colour_model, images)

    def client(k: int) -> bool:
        body = {"dataframe_records": [{"image": base64_of(images[k])}]}
        for _ in range(15):
            status, text = request(served, body)
            got = json.loads(text)["predictions"][0]["probabilities"]
            if status != 200 or not np.allclose(got, expected[k], rtol=1e-6):
                return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(client, range(8)))


def test_25_a_missing_runtime_fails_clearly(saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ai_edge_litert", "tflite_runtime"):
        # None in sys.modules: what Python finds where a package is not installed.
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, f"{name}.interpreter", raising=False)
    with pytest.raises(MlflowException, match=r"needs one of the packages .* pip install ai-edge-litert"):
        mlflow.pyfunc.load_model(str(saved["tflite"]))
    # What is known of it can be read without a runtime.
    assert isinstance(load_model(str(saved["tflite"])), TfliteModel)


def test_25_a_missing_delegate_fails_clearly(saved: dict[str, Path]) -> None:
    with pytest.raises(MlflowException, match=r"delegate .* cannot be loaded; received libnone\.so"):
        mlflow.pyfunc.load_model(str(saved["tflite"]), model_config={"delegate": "/opt/lib/libnone.so"})


def test_25_an_edge_tpu_answers_where_there_is_one(
    colour_model: TfliteModel, edgetpu_directory: Path, tmp_path: Path
) -> None:
    import dataclasses

    from foxnas_mlflow.tflite import EdgeTpuCompiler

    compiled = tmp_path / "compiled.tflite"
    compiler = EdgeTpuCompiler(str(edgetpu_directory / "edgetpu_compiler"))
    compiled.write_bytes(compiler.compile(colour_model.path.read_bytes()))
    # No twin for the processor: what answers is the device.
    save_model(dataclasses.replace(colour_model, path=compiled), tmp_path / "model", kind="edgetpu")
    images = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    program = (
        "import mlflow, numpy\n"
        f"model = mlflow.pyfunc.load_model({str(tmp_path / 'model')!r})\n"
        f"print(model.predict(numpy.load({str(tmp_path / 'images.npy')!r})).to_json(orient='records'))\n"
    )
    completed = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "LD_LIBRARY_PATH": str(edgetpu_directory)},
        capture_output=True,
        text=True,
        check=True,
    )
    save_model(colour_model, tmp_path / "int8")
    expected = mlflow.pyfunc.load_model(str(tmp_path / "int8")).predict(images)
    answers = pd.DataFrame(json.loads(completed.stdout.splitlines()[-1]))
    pd.testing.assert_frame_equal(answers, expected, check_dtype=False)


def test_25_a_missing_edge_tpu_falls_back_with_a_warning(colour_model: TfliteModel, tmp_path: Path) -> None:
    import dataclasses

    compiled = tmp_path / "compiled.tflite"
    compiled.write_bytes(colour_model.path.read_bytes())
    both = dataclasses.replace(colour_model, path=compiled, fallback=colour_model.path)
    save_model(both, tmp_path / "both")
    with pytest.warns(UserWarning, match="running on the processor"):
        model = mlflow.pyfunc.load_model(str(tmp_path / "both"))
    assert model.predict(pd.DataFrame({"image": jpegs()[:3]}))["label"].tolist() == list(LABELS)
    assert load_model(str(tmp_path / "both")).fallback is not None  # type: ignore[union-attr]
    alone = dataclasses.replace(colour_model, path=compiled)
    save_model(alone, tmp_path / "alone", kind="edgetpu")
    with pytest.raises(MlflowException, match=r"delegate .* cannot be loaded; received libedgetpu\.so\.1.*2\.11 alone"):
        mlflow.pyfunc.load_model(str(tmp_path / "alone"))
