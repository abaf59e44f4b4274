"""The command line, and what importing costs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from foxnas_mlflow.cli.main import COMMANDS, build_parser, main
from foxnas_mlflow.cli.parameters import Parameter
from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.workflows import WORKFLOWS

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


def test_public_names_load_on_first_use() -> None:
    import foxnas_mlflow

    for name in foxnas_mlflow.__all__:
        assert getattr(foxnas_mlflow, name) is not None
    assert foxnas_mlflow.log_model.__module__.startswith("foxnas_mlflow.flavor")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = foxnas_mlflow.nothing


def test_mlproject_declares_the_parameters_of_the_commands(root: Path) -> None:
    project = yaml.safe_load((root / "MLproject").read_text())
    assert set(project["entry_points"]) == set(COMMANDS)
    for name, entry in project["entry_points"].items():
        import importlib

        declared = {key: value["default"] for key, value in entry["parameters"].items()}
        ported = {workflow.name: workflow for workflow in WORKFLOWS}
        if name in ported:
            assert declared == {p.name: p.default_text for p in ported[name].request.parameters()}
        else:
            module = importlib.import_module(f"foxnas_mlflow.cli.commands.{name}")
            assert declared == {p.name: str(p.default) for p in module.PARAMETERS}
        used = re.findall(r"--([a-z-]+) \{([a-z_]+)\}", entry["command"])
        assert {(o.replace("-", "_"), v) for o, v in used} == {(k, k) for k in declared}


def test_every_option_has_help_and_a_default() -> None:
    parser = build_parser()
    assert parser.prog == "foxnas"
    with pytest.raises(SystemExit) as stop:
        main(["search", "--help"])
    assert stop.value.code == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["search", "--target", "nope"], "target must be one of"),
        (["search", "--latency-ms", "0"], "positive number"),
        (["search", "--latency-ms", "-1"], "positive number"),
        (["search", "--latency-ms", "nan"], "finite"),
        (["search", "--latency-ms", "abc"], "must be a number"),
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


def test_parameters_are_checked() -> None:
    assert Parameter("n", 3, "", int).parse(" 4 ") == 4
    assert Parameter("x", "", "").parse("") == ""
    assert Parameter("flag", False, "", bool).parse("yes") is True
    for parameter, text in ((Parameter("n", 3, "", int), "4.5"), (Parameter("c", "a", "", choices=("a",)), "b")):
        with pytest.raises(InvalidInputError, match=parameter.name):
            parameter.parse(text)
