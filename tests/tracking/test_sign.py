"""Signatures: who vouches for a version, and which change, key or copy ends or keeps it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from foxnas_mlflow.cli.main import main
from foxnas_mlflow.flavor import SIGNATURE, model_id_of
from tests.keys import make_key
from tests.versions import FIGURES, NAME, log_measurement, register_version, state

pytest.importorskip("model_signing", reason="the extra sign is not installed")
pytestmark = pytest.mark.server


def promote(version: str, public: str, stage: str = "Staging") -> int:
    return main(["promote", "--model", f"models:/{NAME}/{version}", "--stage", stage, "--verify-key", public])


def test_only_what_the_key_signed_is_promoted(
    tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = make_key(tmp_path, "release")
    _, other = make_key(tmp_path, "other")
    register_version(tmp_path)
    assert promote("1", public) == 2
    assert "signature: nobody signed it; run foxnas sign" in capsys.readouterr().err
    assert main(["sign", "--model", f"models:/{NAME}/1", "--signing-key", private]) == 0
    out = capsys.readouterr().out
    assert f"Next: foxnas benchmark --model models:/{NAME}/1 --device ssh://user@board --signing-key {private}" in out
    assert f"foxnas promote --model models:/{NAME}/1 --verify-key" in out
    assert promote("1", other) == 2
    assert "must be signed by the key other.pub" in capsys.readouterr().err
    # The model is vouched for, what was measured of it is not.
    assert promote("1", public) == 2
    err = capsys.readouterr().err
    assert "nobody signed its measurement: run foxnas benchmark with --signing-key" in err
    assert "signature:" not in err
    assert state() == {"aliases": {}, "stages": {"1": "None"}}
    client = mlflow.MlflowClient()
    log_measurement(str(model_id_of(client.get_model_version(NAME, "1"))), FIGURES, signing_key=private)
    assert promote("1", public) == 0
    assert "signed with the key that was given" in capsys.readouterr().out
    assert state()["aliases"] == {"staging": "1"}

    # A copy of the version is the same model.
    client.copy_model_version(f"models:/{NAME}/1", NAME)
    assert promote("2", public) == 0

    # The signature is the standard's: its own command takes it.
    run = client.search_runs(["0"], "tags.`foxnas.stage` = 'sign'")[0]
    signature = mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/model.sig", dst_path=str(tmp_path))
    files = mlflow.artifacts.download_artifacts(f"models:/{NAME}/1", dst_path=str(tmp_path / "files"))
    command = [
        sys.executable,
        "-m",
        "model_signing",
        "verify",
        "key",
        files,
        "--signature",
        signature,
        "--public_key",
        public,
    ]
    command += ["--ignore-paths", str(Path(files) / "registered_model_meta")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    # What was signed for another model does not vouch for this one.
    register_version(tmp_path, {"accuracy/int8_top1": 76.0})
    ids = [model_id_of(client.get_model_version(NAME, number)) for number in ("1", "3")]
    client.set_logged_model_tags(ids[1], {SIGNATURE: client.get_logged_model(ids[0]).tags[SIGNATURE]})
    assert promote("3", public) == 2
    assert "with the content that it has" in capsys.readouterr().err


def test_a_measurement_that_somebody_wrote_over_does_not_count(
    tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = make_key(tmp_path, "release")
    forger, _ = make_key(tmp_path, "forger")
    register_version(tmp_path, {"benchmark/latency_ms_p90": 90.0})
    model_id = str(model_id_of(mlflow.MlflowClient().get_model_version(NAME, "1")))
    assert main(["sign", "--model", f"models:/{NAME}/1", "--signing-key", private]) == 0
    slow = log_measurement(model_id, {**FIGURES, "benchmark/latency_ms_p90": 90.0}, signing_key=private)
    command = ["promote", "--model", f"models:/{NAME}/1", "--max-latency-ms", "60", "--verify-key", public]
    # The slow one counts, however fast the newer ones are that others signed, or nobody.
    for key in ("", forger):
        fast = log_measurement(model_id, FIGURES, signing_key=key)
        assert main(command) == 2
        assert "latency: p90 90 ms > 60 ms" in capsys.readouterr().err
    document = mlflow.artifacts.load_text(f"runs:/{fast}/benchmark.json")
    mlflow.MlflowClient().log_text(slow, document, "benchmark.json")
    assert main(command) == 2
    assert (
        "benchmark.json must be signed by the key release.pub, with the content that it has" in capsys.readouterr().err
    )
    assert state()["aliases"] == {}


def test_a_measurement_is_signed_where_it_is_made(
    tracking: str, tmp_path: Path, undisturbed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = make_key(tmp_path, "release")
    register_version(tmp_path, {"benchmark/latency_ms_p90": None}, target="cpu", tags={"target": "cpu"})
    assert main(["sign", "--model", f"models:/{NAME}/1", "--signing-key", private]) == 0
    command = ["benchmark", "--model", f"models:/{NAME}/1", "--runs", "20", "--warmup", "1", "--signing-key"]
    # A key that cannot be read ends it before anything is measured.
    assert main([*command, "none.pem"]) == 2
    assert "a key must be a PEM file" in capsys.readouterr().err
    assert mlflow.MlflowClient().search_runs(["0"], "tags.`foxnas.device` = 'local'") == []
    assert main([*command, private]) == 0
    assert promote("1", public) == 0
    assert "signed with the key that was given" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["sign", "--model", f"models:/{NAME}/1"], "give --signing-key key.pem"),
        (["sign", "--signing-key", "key.pem"], "model must be a registered model"),
        (["sign", "--model", f"models:/{NAME}/1", "--signing-key", "none.pem"], "a key must be a PEM file"),
        (["sign", "--model", f"models:/{NAME}/1", "--signing-key", "text.pem"], "a key must be a PEM file"),
    ],
)
def test_bad_input_is_one_line(
    tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], words: str
) -> None:
    register_version(tmp_path)
    Path("text.pem").write_text("no key")
    assert main(command) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("foxnas: "))
    assert words in line
