"""The command line, and what importing costs."""

from __future__ import annotations

import configparser
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from foxnas_mlflow.cli.main import build_parser, main
from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.pins import pins
from foxnas_mlflow.workflows import WORKFLOWS, AnyWorkflow, Request, parameter
from foxnas_mlflow.workflows.init import TORCHRUN, project_files

HEAVY = ("torch", "tensorflow", "statsmodels", "mlflow", "matplotlib", "plotly", "pandas", "scipy")


@pytest.mark.parametrize(
    "statement", ["import foxnas_mlflow", "from foxnas_mlflow.cli.main import main; main(['--help'])"]
)
def test_light_imports(statement: str) -> None:
    code = (
        f"import sys\ntry:\n    {statement}\nexcept SystemExit:\n    pass\n"
        f"sys.exit(' '.join(m for m in {HEAVY} if m in sys.modules) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_checkouts_project_is_the_one_that_init_writes(root: Path) -> None:
    for name, text in project_files(root).items():
        assert (root / name).read_text(encoding="utf-8") == text, "type: foxnas init . --overwrite"


def test_init_writes_a_project_whose_commands_take_every_parameter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", str(tmp_path / "project")]) == 0
    project = yaml.safe_load((tmp_path / "project" / "MLproject").read_text())
    requests = {workflow.name: workflow.request for workflow in WORKFLOWS if workflow.entry_point}
    assert set(project["entry_points"]) == {*requests, "supernet_torchrun"}
    for name, entry in project["entry_points"].items():
        declared = {key: value["default"] for key, value in entry["parameters"].items()}
        filled = [part.format(**declared) for part in entry["command"].split()]  # empty values too
        if name == "supernet_torchrun":
            assert filled[:3] == ["python", "-m", "torch.distributed.run"]
            assert filled[filled.index("--nproc-per-node") + 1] == declared["nproc_per_node"] == "auto"
            filled = ["python", *filled[filled.index("-m", 3) :]]
            declared = {key: value for key, value in declared.items() if key not in dict(TORCHRUN)}
        request = requests[name.removesuffix("_torchrun")]
        assert declared == {p.name: p.default_text for p in request.parameters()}
        assert filled[:3] == ["python", "-m", "foxnas_mlflow"]
        parsed = vars(build_parser().parse_args(filled[3:]))
        assert {key: parsed[key] for key in declared} == declared
    packages = yaml.safe_load((tmp_path / "project" / "conda.yaml").read_text())["dependencies"][-1]["pip"]
    assert packages[0].startswith("foxnas-mlflow")
    assert packages[1:] == [f"{package}=={version}" for package, version in pins().items()]
    capsys.readouterr()
    # Again it is as it was; what somebody changed is left alone.
    assert main(["init", str(tmp_path / "project")]) == 0
    (tmp_path / "project" / "conda.yaml").write_text("name: mine\n")
    assert main(["init", str(tmp_path / "project")]) == 2
    assert "another conda.yaml" in capsys.readouterr().err
    assert (tmp_path / "project" / "conda.yaml").read_text() == "name: mine\n"


def test_pins_are_of_packages_that_the_package_declares(root: Path) -> None:
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg")
    declared = setup["options"]["install_requires"] + "".join(setup["options.extras_require"].values())
    named = {re.split(r"[<>=\[]", line)[0].lower() for line in declared.splitlines()}
    assert {package.lower() for package in pins()} <= named


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.name)
def test_every_option_shows_its_help_and_its_default(
    workflow: AnyWorkflow, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit) as stop:
        main([workflow.name, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for declared in workflow.request.parameters():
        assert declared.rules.help
        assert declared.rules.help in shown
        if declared.default_text:
            assert f"{declared.rules.help} (default: {declared.default_text})" in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["search", "--target", "nope"], "target must be one of"),
        (["search", "--latency-ms", "0"], "positive number"),
        (["search", "--latency-ms", "-1"], "positive number"),
        (["search", "--latency-ms", "nan"], "finite"),
        (["search", "--latency-ms", "abc"], "must be numbers, comma separated"),
        (["search", "--latency-ms", "10,10"], "latencies must be given, each of them once"),
        (["search", "--latency-ms", "60,20"], "smallest reachable latency is 37"),
        (["search", "--limits", "beauty<=3"], "int8_size_bytes"),
        (["search", "--limits", "latency_ms<=40kB"], "has one of the units ['us', 'ms', 's'], or none"),
        (["search", "--limits", "macs>=40"], "a limit reads quantity<=value"),
        (["search", "--latency-ms", "60", "--limits", "latency_ms<=70"], "a quantity has one limit"),
        (["search", "--limits", "latency_ms<=60, int8_size_bytes<=1kB"], "smallest that each can reach alone"),
        (["search", "--min-accuracy", "77.9", "--latency-ms", "60"], "the most accurate network is predicted 72.976"),
        (["search", "--min-accuracy", "101"], "min_accuracy must be above 0 and below 100"),
        (["search", "--objective", "latency_ms"], "give min_accuracy in percent"),
        (["search", "--objective", "beauty", "--min-accuracy", "70"], "int8_size_bytes"),
        (["search", "--objective", "knee", "--latency-ms", "60,70"], "a front has one knee"),
        (["search", "--tolerance-points", "much"], "tolerance_points must be auto, or 0 to 100 points"),
        (["main", "--limits", "macs<=0"], "must be limited to a positive number"),
        (["main", "--limits", "int8_size_byte<=2M"], "are ['latency_ms', 'energy_mj', 'int8_size_bytes'"),
        (["main", "--limits", "energy_mj<=5"], "received energy_mj without energy; give --energy auto, or a command"),
        (["main", "--limits", "energy_mj<=5", "--energy", "auto", "--device", "none"], "are measured on a device"),
        (["main", "--objective", "latency", "--min-accuracy", "90"], "received latency; choose one of these"),
        (["main", "--class-weights", "balanced", "--sampling", "balanced"], "both make up for rare classes"),
        (["main", "--supernet", "models:/x/1", "--epochs", "9"], "names a trained one; received --epochs 9;"),
        (["main", "--supernet", "models:/x/1", "--max-train", "9"], "received --max-train 9;"),
        (["search", "--latency-ms", "20"], "smallest reachable latency is 37"),
        (["search", "--confidence", "1"], "confidence"),
        (["search", "--space", "nope"], "space must be one of"),
        (["search", "--predictors", "/does/not/exist.json"], "readable"),
        (["search", "--image-size", "224"], "224 px"),
        (["search", "--target", "edgetpu"], "know nothing of accuracy"),
        (["search", "--target", "cpu"], "foxnas device calibrate"),
        (["fit"], "measurements"),
        (["fit", "--measurements", "/does/not/exist.csv"], "readable"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    # MLflow logs to the same stream when it makes a new database.
    lines = [line for line in capsys.readouterr().err.splitlines() if "mlflow.store.db" not in line]
    assert len(lines) == 1
    assert message in lines[0]


def test_a_least_accuracy_alone_asks_for_the_fastest_network_of_it() -> None:
    from foxnas_mlflow import SearchRequest

    def asked(**values: Any) -> tuple[str, tuple[float | None, ...]]:
        request = SearchRequest(min_accuracy=74, **values)
        return request.goal, request.latencies_ms

    assert asked() == ("latency_ms", (None,))
    assert asked(latency_ms=80) == ("accuracy", (80,))
    assert asked(limits="macs<=300M") == ("accuracy", (None,))
    assert asked(objective="macs") == ("macs", (None,))
    assert asked(objective="knee") == ("knee", (None,))
    assert SearchRequest().latencies_ms == (60,)


@dataclass(frozen=True, kw_only=True)
class Sample(Request):
    """One field of every kind."""

    text: str = parameter("", "Text.")
    choice: Literal["a", "b"] = parameter("a", "A choice.")
    count: int = parameter(3, "A count.", at_least=1)
    share: float = parameter(0.5, "A share.", at_least=0, below=1)
    limit: float | None = parameter(None, "A limit.", above=0)
    flag: bool = parameter(False, "A flag.")
    sizes: tuple[int, ...] = parameter((), "Sizes.", at_least=8)


def test_texts_and_values_make_the_same_request() -> None:
    texts = {
        "text": " t ",
        "choice": "b",
        "count": " 4 ",
        "share": "0.25",
        "limit": "2",
        "flag": "yes",
        "sizes": "8,16",
    }
    request = Sample.parse(texts)
    assert request == Sample(text="t", choice="b", count=4, share=0.25, limit=2, flag=True, sizes=(8, 16))
    assert type(request.limit) is float
    assert Sample.parse(request.texts()) == request
    assert Sample.parse(dict.fromkeys(("text", "limit", "sizes"), "")) == Sample()
    assert request.values()["sizes"] == [8, 16]


@pytest.mark.parametrize(
    ("name", "text", "value", "message"),
    [
        ("choice", "c", "c", "choice must be one of ['a', 'b']; received c."),
        ("count", "0", 0, "count must be positive; received 0."),
        ("share", "1", 1.0, "share must be at least 0 and below 1; received 1.0."),
        ("limit", "0", 0.0, "limit must be a positive number; received 0.0."),
        ("share", "nan", math.nan, "share must be a finite number; received nan."),
        ("sizes", "8,4", (8, 4), "sizes must be at least 8; received 4."),
    ],
)
def test_a_wrong_value_is_the_same_error_typed_or_from_python(
    name: str, text: str, value: object, message: str
) -> None:
    with pytest.raises(InvalidInputError) as typed:
        Sample.parse({name: text})
    with pytest.raises(InvalidInputError) as built:
        Sample(**{name: value})  # type: ignore[arg-type]
    assert str(typed.value) == str(built.value) == message


@pytest.mark.parametrize(("name", "text"), [("count", "4.5"), ("count", ""), ("share", "x"), ("flag", "maybe")])
def test_a_text_of_another_type_is_refused(name: str, text: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^{name} must be "):
        Sample.parse({name: text})


@pytest.mark.parametrize(("name", "value"), [("count", "4"), ("count", True), ("text", 4), ("sizes", "8")])
def test_a_value_of_another_type_is_refused(name: str, value: object) -> None:
    with pytest.raises(InvalidInputError, match=f"^{name} must be "):
        Sample(**{name: value})  # type: ignore[arg-type]
