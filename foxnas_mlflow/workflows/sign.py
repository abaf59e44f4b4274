"""Sign: somebody vouches with a key for the files of a registered version; `promote` can ask for it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.workflows._request import Request, parameter
from foxnas_mlflow.workflows._workflow import Result, Workflow

SIGNATURE_FILE = "model.sig"


@dataclass(frozen=True, kw_only=True)
class SignRequest(Request):
    """What to sign; see `run_sign`."""

    model: str = parameter(
        "", "Registered version: models:/name/3, models:/name@staging, models:/name or name (the newest)."
    )
    signing_key: str = parameter("", "Private key of an elliptic curve, a PEM file.")

    def check(self) -> None:
        """A model and a key must be named."""
        if not self.model:
            raise InvalidInputError("model must be a registered model", remedy="give --model models:/NAME/VERSION")
        if not self.signing_key:
            raise InvalidInputError("signing_key must be a PEM file", remedy="give --signing-key key.pem")


@dataclass(frozen=True, kw_only=True)
class SignResult(Result):
    """A signed version.

    Attributes:
        model_uri: The version; all versions of the same logged model have the signature.
    """

    model_uri: str


def run_sign(request: SignRequest) -> SignResult:
    """Check a version's files, sign them, and keep the signature with the model and the run.

    Args:
        request: What to sign, and with which key.

    Raises:
        InvalidInputError: If the key cannot be read.
        InvalidFormatError: If the files are not as they were logged.
    """
    from pathlib import Path

    from foxnas_mlflow.core.targets import BUILTIN_TARGETS
    from foxnas_mlflow.flavor import keep_signature, signer
    from foxnas_mlflow.tracking.promotion import checked_files
    from foxnas_mlflow.tracking.registry import find_version, version_uri
    from foxnas_mlflow.tracking.run import entry_run

    version = find_version(request.model)
    name = f"{version.name} version {version.version}"
    with entry_run(stage="sign", params=request.texts(), tags={"foxnas.signed": name}) as run:
        files = checked_files(version, run.directory)
        if files.model_id is None:
            raise InvalidInputError(
                "a version of a logged model can be signed", received=name, remedy="log it again with this release"
            )
        signature = signer(Path(request.signing_key))(files.directory)
        keep_signature(files.model_id, signature)
        run.log_text(signature, SIGNATURE_FILE)
        uri = version_uri(version.name, version.version)
        quoted = shlex.quote(uri)
        target = BUILTIN_TARGETS.get(version.tags.get("target", ""))
        device = "" if target is None else target.device_option
        summary = (
            f"{name} is signed: {len(files.manifest.files)} files and what describes them.\n"
            f"  run           {run.run_id}: {SIGNATURE_FILE}\n"
            f"Next: foxnas benchmark --model {quoted}{device} --signing-key {shlex.quote(request.signing_key)}\n"
            f"and then, with a signed measurement: foxnas promote --model {quoted} --verify-key PUBLIC_KEY.pem"
        )
        return SignResult(run_id=run.run_id, model_uri=uri, summary=summary)


WORKFLOW = Workflow(
    "sign",
    "Sign the files of a registered version (OpenSSF model signing), for promote --verify-key.",
    SignRequest,
    run_sign,
    entry_point=False,
)
