"""The client of the target ``edge``, as `mlflow.deployments` wants it."""

from __future__ import annotations

import base64
import contextlib
import io
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlflow.deployments import BaseDeploymentClient, PredictionsResponse
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INVALID_PARAMETER_VALUE,
    RESOURCE_ALREADY_EXISTS,
    RESOURCE_DOES_NOT_EXIST,
)

from foxnas_mlflow.core.errors import FoxNasError, InvalidInputError

logger = logging.getLogger("foxnas_mlflow")

_CODES = {"exists": RESOURCE_ALREADY_EXISTS, "no_deployment": RESOURCE_DOES_NOT_EXIST}

_HELP = """\
edge: int8 models of the flavor foxnas on a board.

Target URI
    edge://user@host[:port]     through ssh; the host's key must be known, keys come from the agent or ~/.ssh
    edge://local                this machine
    ?python=/path  Python there (3.7 or newer, with numpy and ai-edge-litert or tflite-runtime; Pillow to decode images)
    ?key=/path     private key
    ?root=/path    directory of the deployments there, by default ~/.foxnas/deployments

    mlflow deployments create -t edge://pi@board -m models:/foxnas-rpi4@production --name camera
    mlflow deployments update -t edge://pi@board -m models:/foxnas-rpi4/7 --name camera
    mlflow deployments update -t edge://pi@board --name camera -C rollback=true
    mlflow deployments predict -t edge://pi@board --name camera -I images.json     {"image": ["<base64>", ...]}

Configuration, -C key=value
    threads=       threads of one inference; as the target that the model was made for has
    delegate=PATH  delegate library there; by default libedgetpu.so.1 for a model of kind edgetpu. Of several Edge
                   TPUs that is the first free one; libedgetpu.so.1@usb:1 names one
    tolerance=2    largest difference between the board's output and this host's, in quantization steps (of floats:
                   thousandths of the largest one)
    rollback=true  (update only) back to the version that was active before
    serve=true     whether the board serves it; by default a new deployment is
    port=N         port to listen at; by default the first free one from 5001 on, and that one from then on
    host=ADDRESS   address to listen at, by default 127.0.0.1: whoever reaches another one is not asked who it is
    workers=1      requests that are answered at a time
    account=NAME   account of the board that serves (deploy as root); by default the one that deploys
    verify_key=PEM public key, a file of this host: only what it signed (foxnas sign) is deployed

A version is copied aside, its checksums are compared, and it must answer as this host does; then it
becomes the active one in one step, and no request is lost. The version before stays for a rollback. On the board:

    curl -s -H 'Content-Type: image/jpeg' --data-binary @photo.jpg http://127.0.0.1:5001/invocations
    python3 ~/.foxnas/deployments/camera/current/runner.pyz classify photo.jpg

The service speaks as MLflow's scoring server does (/ping, /version, /invocations), also over the socket
~/.foxnas/deployments/camera/run/http.sock; /info and /metrics tell more. It starts with the board: by systemd, or
by cron where that is not; `get` says by what.

A board without Pillow classifies .npy files there, and `predict` decodes on this host instead.
"""


def target_help() -> str:
    """What ``mlflow deployments help -t edge`` prints."""
    return _HELP


def run_local(name: str, model_uri: str, flavor: str | None = None, config: Mapping[str, Any] | None = None) -> None:
    """Deploy to this machine, for a test; ``edge://local`` manages it from then on.

    MLflow calls it without the target that its own documentation puts first.

    Args:
        name: Name of the deployment.
        model_uri: URI of the model.
        flavor: ``foxnas`` or None.
        config: Configuration, see `target_help`.

    Raises:
        MlflowException: If it cannot be deployed.
    """
    deployment = EdgeDeploymentClient("edge://local").create_deployment(name, model_uri, flavor, dict(config or {}))
    print(f"{name} is deployed to {deployment['directory']}")
    service = deployment["service"]
    if service is not None:
        print(f"it is served at {service['url']}{' (' + service['note'] + ')' if service['note'] else ''}")
    print(f"next: python {deployment['directory']}/runner.pyz classify photo.jpg")


class EdgeDeploymentClient(BaseDeploymentClient):
    """Deployments on the board of a target URI; every call opens a connection and closes it."""

    def __init__(self, target_uri: str) -> None:
        super().__init__(target_uri)  # type: ignore[no-untyped-call]

    def create_deployment(
        self,
        name: str,
        model_uri: str,
        flavor: str | None = None,
        config: Mapping[str, Any] | None = None,
        endpoint: str | None = None,
    ) -> dict[str, Any]:
        """Copy a model to the board, check its answers there, and make it the active version.

        Args:
            name: Name of the deployment: letters, digits, ``-`` and ``_``.
            model_uri: A model of kind ``tflite`` or ``edgetpu``.
            flavor: ``foxnas`` or None.
            config: Configuration, see `target_help`.
            endpoint: Not used by this target.

        Returns:
            What `get_deployment` returns.

        Raises:
            MlflowException: If the name is taken, the model unsuitable, the board unreachable, or
                an answer there wrong. Nothing is active under the name then.
        """
        with _mlflow_errors():
            return _told(self._deploy(name, model_uri, flavor, dict(config or {}), new=True))

    def update_deployment(
        self,
        name: str,
        model_uri: str | None = None,
        flavor: str | None = None,
        config: Mapping[str, Any] | None = None,
        endpoint: str | None = None,
    ) -> dict[str, Any]:
        """Replace the active version, or with ``rollback=true`` go back to the one before.

        Args:
            name: Name of the deployment.
            model_uri: The new model; none for a rollback.
            flavor: ``foxnas`` or None.
            config: Configuration, see `target_help`.
            endpoint: Not used by this target.

        Returns:
            What `get_deployment` returns.

        Raises:
            MlflowException: As for `create_deployment`, and if there is no such deployment or no
                version before. The version that was active stays active.
        """
        values = dict(config or {})
        with _mlflow_errors():
            rollback = str(values.pop("rollback", "false")).lower()
            if rollback not in ("true", "false"):
                raise InvalidInputError("rollback must be true or false", received=rollback)
            if (rollback == "true") == (model_uri is not None) or (rollback == "true" and values):
                raise InvalidInputError(
                    "an update needs either a model (-m) or -C rollback=true alone",
                    received=f"model_uri={model_uri}, config={dict(config or {})}",
                )
            if model_uri is not None:
                return _told(self._deploy(name, model_uri, flavor, values, new=False))
            with _board(self.target_uri) as board:
                return _told(board.call("rollback", _checked(name)))

    def delete_deployment(
        self, name: str, config: Mapping[str, Any] | None = None, endpoint: str | None = None
    ) -> None:
        """Remove a deployment and all its versions; one that is not there is no error."""
        with _mlflow_errors(), _board(self.target_uri) as board:
            board.call("delete", _checked(name))

    def list_deployments(self, endpoint: str | None = None) -> list[dict[str, Any]]:
        """All deployments of the board, as `get_deployment` returns them; a damaged one has ``name`` and ``error``."""
        with _mlflow_errors(), _board(self.target_uri) as board:
            return [_public(deployment) for deployment in board.call("list")["deployments"]]

    def get_deployment(self, name: str, endpoint: str | None = None) -> dict[str, Any]:
        """Name, flavor, kind, model, checksum, directory, version, smoke test and service of a deployment.

        ``service`` is None if it is not served; otherwise its ``state`` (``running`` or ``stopped``), the ``version``
        that it serves, ``url``, ``socket``, ``workers``, ``account``, what it starts by, and a ``note``.

        ``decodes_images`` is false where the board has no Pillow: it classifies arrays only, and
        `predict` decodes on this host.

        Raises:
            MlflowException: If there is none of that name.
        """
        with _mlflow_errors(), _board(self.target_uri) as board:
            return _public(board.call("get", _checked(name)))

    def predict(
        self, deployment_name: str | None = None, inputs: Any = None, endpoint: str | None = None
    ) -> PredictionsResponse:
        """Classify images on the board.

        Every call starts the runner there anew: to look at a deployment, not to serve from it.

        Args:
            deployment_name: Name of the deployment.
            inputs: As for the pyfunc: a table or mapping with a column ``image`` of JPEG or PNG
                files (bytes or base64 text), or arrays (n, height, width, channels), uint8 or
                float in 0..1.
            endpoint: Not used by this target.

        Returns:
            ``{"predictions": [{"label", "probability", "probabilities"}, ...]}``, each with ``rejected`` too where
            the model knows when an image is none of its classes.

        Raises:
            MlflowException: If there is no such deployment, or an image is refused.
        """
        from foxnas_mlflow.data.preprocess import Preprocessing
        from foxnas_mlflow.deploy._board import RunnerRefusedError
        from foxnas_mlflow.flavor import images_of

        with _mlflow_errors(), _board(self.target_uri) as board:
            name = _checked(deployment_name)
            images = images_of(inputs)
            try:
                rows = board.predict(name, [_packed(image) for image in images])
            except RunnerRefusedError as error:
                if error.kind != "no_pillow":
                    raise
                # A board without Pillow gets the pixels, made here by the same code.
                preprocessing = Preprocessing.from_dict(board.call("get", name)["preprocessing"])
                pixels = [preprocessing.decode(image) if isinstance(image, bytes) else image for image in images]
                rows = board.predict(name, [_packed(image) for image in pixels])
            return PredictionsResponse({"predictions": rows})

    def _deploy(
        self, name: str, model_uri: str, flavor: str | None, config: dict[str, Any], *, new: bool
    ) -> dict[str, Any]:
        import mlflow
        from mlflow.models.model import MLMODEL_FILE_NAME

        from foxnas_mlflow.deploy._bundle import Options, bundle
        from foxnas_mlflow.flavor import FLAVOR_NAME, TfliteModel, check_signed, load_model

        if flavor not in (None, FLAVOR_NAME):
            raise InvalidInputError(f"the target edge deploys the flavor {FLAVOR_NAME!r} only", received=flavor)
        options = Options.from_config(config)
        _checked(name)
        # An alias may move meanwhile: what is looked up, copied and written down is one version.
        source = _resolved(model_uri)
        info = mlflow.models.get_model_info(source)
        kind = info.flavors.get(FLAVOR_NAME, {}).get("kind", "another flavor")
        with tempfile.TemporaryDirectory() as directory:
            # What is checked is what is deployed: its files are downloaded once, and its seal looked up by its URI.
            model = load_model(source, directory)
            if options.verify_key is not None:
                (description,) = Path(directory).rglob(MLMODEL_FILE_NAME)
                check_signed(description.parent, info.model_id, options.verify_key)
            if not isinstance(model, TfliteModel):
                raise InvalidInputError(
                    "only a model of kind tflite or edgetpu can be deployed",
                    received=f"{model_uri}: {kind}",
                    remedy="convert a subnet with: foxnas quantize",
                )
            files = bundle(model, options, name=name, kind=kind, source=source, model_id=info.model_id)
        with _board(self.target_uri) as board:
            deployed: dict[str, Any] = board.deploy(name, files, options.service, new=new)
            return deployed


def _board(target_uri: str) -> Any:
    from foxnas_mlflow.deploy._board import open_board

    return open_board(target_uri)


def _resolved(model_uri: str) -> str:
    """An alias or stage as the version that it means now: the board keeps what was deployed."""
    from mlflow import MlflowClient
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    if model_uri.startswith("models:/"):
        named = get_model_name_and_version(MlflowClient(), model_uri)
        if len(named) == 2:
            return f"models:/{named[0]}/{named[1]}"
    return model_uri


def _checked(name: str | None) -> str:
    # It becomes a directory on the board, and an argument of a command there.
    if name is None or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise InvalidInputError(
            "a deployment's name has 1 to 64 letters, digits, '-' and '_', and starts with a letter or digit",
            received=repr(name),
        )
    return name


def _told(deployment: dict[str, Any]) -> dict[str, Any]:
    """What was deployed; what there is to do for its service is said."""
    service = deployment["service"]
    if service is not None and service["note"]:
        logger.warning("%s: %s", deployment["name"], service["note"])
    return _public(deployment)


def _public(deployment: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in deployment.items() if key != "preprocessing"}


def _packed(image: Any) -> dict[str, str]:
    """An image for the runner: a file's bytes, or an array in NumPy's own format."""
    import numpy as np

    if isinstance(image, bytes):
        return {"file": base64.b64encode(image).decode()}
    buffer = io.BytesIO()
    np.save(buffer, image, allow_pickle=False)
    return {"array": base64.b64encode(buffer.getvalue()).decode()}


@contextlib.contextmanager
def _mlflow_errors() -> Iterator[None]:
    """At the border to MLflow every error of ours is an `MlflowException` with the same line."""
    try:
        yield
    except FoxNasError as error:
        code = _CODES.get(getattr(error, "kind", ""), INVALID_PARAMETER_VALUE)
        raise MlflowException(str(error), code) from error
