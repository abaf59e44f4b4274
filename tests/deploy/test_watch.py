"""A deployment that follows an alias: real deliveries of a real MLflow server, a board that is a directory."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import hashlib
import hmac
import http.client
import ipaddress
import json
import os
import resource
import socket
import socketserver
import ssl
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from mlflow import MlflowClient
from mlflow.deployments import get_deploy_client
from mlflow.exceptions import MlflowException
from mlflow.webhooks.delivery import _generate_hmac_signature as signature_of

from foxnas_mlflow.cli.main import main
from foxnas_mlflow.core.errors import ConnectionLostError, InvalidInputError
from foxnas_mlflow.deploy import _bundle
from foxnas_mlflow.deploy._board import Board, RunnerRefusedError
from foxnas_mlflow.deploy.follow import Followed, Follower
from foxnas_mlflow.deploy.webhook import FRESH_SECONDS, Deliveries, DeliveryRefusedError, receiving
from foxnas_mlflow.devices import LocalConnection
from foxnas_mlflow.devices._base import Completed
from foxnas_mlflow.flavor import TfliteModel, log_model, model_id_of
from foxnas_mlflow.workflows import WatchRequest, WatchResult, run_watch
from tests.colour_model import LABELS
from tests.deploy.boards import needs_sshd, ssh_target
from tests.keys import make_key
from tests.servers import free_port, request, tracking_server

pytestmark = pytest.mark.server

SECRET = "a secret of a webhook in a test"
EVENT = {"entity": "model_version_alias", "action": "created", "data": {"name": "foxnas-rpi4", "alias": "production"}}


def signed(body: bytes, secret: str = SECRET, *, name: str = "one", at: float = 1e9) -> dict[str, str]:
    """Headers as MLflow makes them."""
    stamp = str(int(at))
    signature = signature_of(secret, name, stamp, body.decode())
    return {"X-MLflow-Delivery-Id": name, "X-MLflow-Timestamp": stamp, "X-MLflow-Signature": signature}


def test_a_delivery_is_accepted_once_while_it_is_fresh_and_as_it_was_signed() -> None:
    body = json.dumps(EVENT).encode()
    assert Deliveries(SECRET).check(signed(body), body, now=1e9 + FRESH_SECONDS) == EVENT
    # By the definition, without MLflow's code; a sender may sign with an old secret too.
    by_hand = base64.b64encode(hmac.new(SECRET.encode(), b"one.1000000000." + body, hashlib.sha256).digest()).decode()
    two = signed(body) | {"X-MLflow-Signature": f"v1,b2xk v1,{by_hand}"}
    assert Deliveries(SECRET).check({key.lower(): value for key, value in two.items()}, body, now=1e9) == EVENT
    refused = [
        (signed(body), body + b" ", 1e9, 401),
        (signed(body, "another secret"), body, 1e9, 401),
        (signed(body) | {"X-MLflow-Delivery-Id": "two"}, body, 1e9, 401),
        (signed(body) | {"X-MLflow-Timestamp": "1000000001"}, body, 1e9, 401),
        (signed(body) | {"X-MLflow-Signature": "v1," + "A" * 44}, body, 1e9, 401),
        (signed(body) | {"X-MLflow-Signature": ""}, body, 1e9, 401),
        ({}, body, 1e9, 401),
        (signed(body), body, 1e9 + FRESH_SECONDS + 1, 401),
        (signed(body), body, 1e9 - FRESH_SECONDS - 1, 401),
        (signed(b"no json"), b"no json", 1e9, 400),
    ]
    deliveries = Deliveries(SECRET)
    for headers, sent, now, status in refused:
        with pytest.raises(DeliveryRefusedError) as error:
            deliveries.check(headers, sent, now)
        assert error.value.status == status
    # Nothing refused counts as seen.
    assert deliveries.check(signed(body), body, now=1e9) == EVENT
    for later in (0, FRESH_SECONDS):
        with pytest.raises(DeliveryRefusedError, match="is taken once") as error:
            deliveries.check(signed(body), body, now=1e9 + later)
        assert error.value.status == 409


def test_a_receiver_without_descriptors_waits_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, get_request = [], socketserver.TCPServer.get_request

    def counted(server: socketserver.TCPServer) -> object:
        asked.append(server)
        return get_request(server)

    monkeypatch.setattr(socketserver.TCPServer, "get_request", counted)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with receiving(SECRET, "127.0.0.1", 0, str) as url, socket.socket() as client:
        os.close(free := os.dup(0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            client.connect(("127.0.0.1", urlsplit(url).port))
            time.sleep(1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert 1 <= len(asked) < 100
        client.settimeout(60)
        client.sendall(b"GET /ping HTTP/1.0\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.0 200")


def certificate(path: Path) -> Path:
    """A PEM file of a certificate of 127.0.0.1 that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "watch")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(built.public_bytes(Encoding.PEM) + secret)
    return path


@pytest.mark.skipif(
    f"{1:032x}" not in (Path("/proc/net/if_inet6").read_text() if Path("/proc/net/if_inet6").exists() else ""),
    reason="this machine has no ::1",
)
def test_deliveries_come_through_ipv6() -> None:
    with receiving(SECRET, "::1", 0, str) as url:
        assert url.startswith("http://[::1]:")
        assert request(f"{url}ping")[0] == 200


def test_deliveries_come_through_tls(tmp_path: Path) -> None:
    pem, told = certificate(tmp_path / "watch.pem"), list[object]()

    def take(value: object) -> str:
        told.append(value)
        return "taken"

    context = ssl.create_default_context(cafile=str(pem))
    body = json.dumps(EVENT).encode()
    with receiving(SECRET, "127.0.0.1", 0, take, certificate=pem) as url:
        assert url.startswith("https://127.0.0.1:")
        # Who does not speak TLS, or says nothing, keeps nobody out.
        silent = socket.create_connection(("127.0.0.1", urlsplit(url).port or 0))
        with pytest.raises(OSError):
            urllib.request.urlopen(url.replace("https", "http"), timeout=60)
        message = urllib.request.Request(url, data=body, headers=signed(body, at=time.time()))
        with urllib.request.urlopen(message, timeout=60, context=context) as answer:
            assert answer.status == 202
        silent.close()
    assert told == [EVENT]


@contextlib.contextmanager
def watching(asked: WatchRequest) -> Iterator[list[WatchResult]]:
    """`run_watch` in a thread, until the block ends; its result then."""
    stop, results = threading.Event(), list[WatchResult]()
    thread = threading.Thread(target=lambda: results.append(run_watch(asked, stop=stop)))
    thread.start()
    try:
        yield results
    finally:
        stop.set()
        thread.join()


def wait_for(holds: Callable[[], bool], seconds: float = 180) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.05)
    return holds()


def announced(port: int, n_bytes: int) -> int:
    """What a body of so many bytes is answered before it is sent."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.putrequest("POST", "/")
        connection.putheader("Content-Length", str(n_bytes))
        connection.endheaders()
        return connection.getresponse().status


def post(url: str, body: bytes, headers: dict[str, str]) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=body, headers=headers), timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_a_board_follows_the_alias_that_a_server_tells_of(
    tracking: str, colour_model: TfliteModel, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cryptography.fernet import Fernet

    monkeypatch.setenv("FOXNAS_WEBHOOK_SECRET", SECRET)
    # A server tells only of addresses of the internet, with https, unless it is told otherwise.
    env = {
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": Fernet.generate_key().decode(),
    }
    port = free_port()
    with tracking_server(tracking, str(tmp_path / "served"), log=tmp_path / "log", env=env) as url:
        mlflow.set_tracking_uri(url)
        mlflow.set_registry_uri(url)
        for labels in (LABELS, ("rouge", "vert", "bleu")):
            with mlflow.start_run():
                model = dataclasses.replace(colour_model, labels=labels)
                log_model(model, name="model", registered_model_name="foxnas-rpi4", code_paths=[])
        client, board = MlflowClient(), get_deploy_client(target)
        hook = client.create_webhook(
            "camera", f"http://127.0.0.1:{port}/", ["model_version_alias.created"], secret=SECRET
        )
        client.set_registered_model_alias("foxnas-rpi4", "production", "1")

        def active() -> str:
            return str(board.get_deployment("camera")["model_uri"])

        def told(version: str) -> str:
            return str(client.get_model_version("foxnas-rpi4", version).tags.get("foxnas.deployment.camera", ""))

        asked = WatchRequest(
            model="foxnas-rpi4", target=target, deployment="camera", port=port, every_s=0, config="threads=2"
        )
        with watching(asked) as results:
            # At its start it looks itself: what was told before is not lost.
            assert wait_for(lambda: told("1") == "deployed on edge://local as version 0001")
            assert active() == "models:/foxnas-rpi4/1"
            assert board.get_deployment("camera")["threads"] == 2
            # The registry's own test of the webhook, of a model that is not ours.
            assert json.loads(str(client.test_webhook(hook.webhook_id).response_body)) == {
                "status": "not of this alias"
            }
            client.set_registered_model_alias("foxnas-rpi4", "production", "2")
            assert wait_for(lambda: told("2") == "deployed on edge://local as version 0002")
            assert active() == "models:/foxnas-rpi4/2"
            # A board that answers otherwise than this host: the version before stays, and the registry says why.
            raw = _bundle.Classifier.raw
            with monkeypatch.context() as patched:
                patched.setattr(_bundle.Classifier, "raw", lambda self, image: raw(self, image) + np.int8(3))
                client.set_registered_model_alias("foxnas-rpi4", "production", "1")
                assert wait_for(lambda: told("1").startswith("refused on edge://local: the board"))
            assert active() == "models:/foxnas-rpi4/2"
            # Deliveries that the server did not sign, or did but once, move nothing.
            body, place = json.dumps(EVENT).encode(), f"http://127.0.0.1:{port}/"
            assert request(place, EVENT)[0] == 401
            assert post(place, body, signed(body, "another secret", at=time.time())) == 401
            assert post(place, body, signed(body, at=time.time() - FRESH_SECONDS - 5)) == 401
            assert announced(port, (1 << 20) + 1) == 413
            assert request(f"{place}ping") == (200, '{"status": "receiving"}')
            assert active() == "models:/foxnas-rpi4/2"
            headers = signed(body, at=time.time())
            assert post(place, body, headers) == 202
            assert wait_for(lambda: told("1") == "deployed on edge://local as version 0003")
            assert post(place, body, headers) == 409
            assert active() == "models:/foxnas-rpi4/1"
        # "same" where the first delivery, which nobody received yet, came again: it is one look more.
        assert [result.state for result in results] in (["updated"], ["same"])

        # Once, for a timer; an alias that nobody has changes nothing.
        client.set_registered_model_alias("foxnas-rpi4", "production", "2")
        words = ["watch", "--once", "--model", "foxnas-rpi4", "--target", target, "--deployment", "camera"]
        assert main(words) == 0
        assert active() == "models:/foxnas-rpi4/2"
        assert main([*words, "--alias", "nobody"]) == 0
        assert active() == "models:/foxnas-rpi4/2"
    # The registry is gone.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert run_watch(WatchRequest(model="foxnas-rpi4", target=target, deployment="camera", once=True)).state == "away"
    assert active() == "models:/foxnas-rpi4/2"


def test_an_error_of_this_host_ends_no_watch(
    versions: tuple[str, str], target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = WatchRequest(model="foxnas-rpi4", target=target, deployment="camera", once=True)
    there = mlflow.get_tracking_uri()
    # A store that is connected to at once: there is no server, or no driver for it.
    mlflow.set_tracking_uri("postgresql://nobody@127.0.0.1:9/none")
    try:
        assert run_watch(asked).state == "away"
    finally:
        mlflow.set_tracking_uri(there)
    with monkeypatch.context() as patched:
        # Downloads go there, and there is no space.
        patched.setattr(tempfile, "tempdir", str(tmp_path / "full"))
        found = run_watch(asked)
    assert found.state == "away"
    assert found.summary.startswith("camera is not yet models:/foxnas-rpi4/1: ")
    assert run_watch(asked).state == "updated"


def test_what_passes_is_no_refusal(versions: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = Follower(f"edge://local?root={tmp_path / 'file'}", "camera", "foxnas-rpi4", "production").look()
    assert found.state == "away"
    assert "local refused; received Not a directory" in found.words


def test_what_passes_is_told_once_until_it_did(versions: tuple[str, str], target: str) -> None:
    client, tag, others = MlflowClient(), "foxnas.deployment.camera", "deployed on edge://local as version 0007"

    def told() -> str:
        return str(client.get_model_version("foxnas-rpi4", "1").tags[tag])

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        follower = Follower(target, "camera", "foxnas-rpi4", "production", {"port": port})
        assert follower.look().state == "away"
        assert told().startswith("not yet on edge://local: a service on local needs an address and a port")
        client.set_model_version_tag("foxnas-rpi4", "1", tag, others)
        assert follower.look().state == "away"
        assert told() == others
    # Whoever deploys it meanwhile.
    get_deploy_client(target).create_deployment("camera", versions[0], config={"serve": "false"})
    assert follower.look().state == "same"
    assert told() == "deployed on edge://local as version 0001"


def test_a_damaged_version_is_replaced_and_hides_nothing_when_it_was(
    versions: tuple[str, str], target: str, tmp_path: Path
) -> None:
    board, place = get_deploy_client(target), tmp_path / "board" / "camera" / "versions"
    follower = Follower(target, "camera", "foxnas-rpi4", "production", {"serve": "false"})
    assert follower.look().state == "updated"
    for number, text in (("0001", "{"), ("0002", "{}"), ("0003", None)):
        file = place / number / "deployment.json"
        file.unlink()
        if text is not None:
            file.write_text(text)
        with pytest.raises(MlflowException, match="files must arrive on local as they were sent"):
            board.get_deployment("camera")
        found = follower.look()
        assert (found.state, found.words) == (
            "updated",
            "camera is models:/foxnas-rpi4/1 now, before a damaged version",
        )
        deployed = board.get_deployment("camera")
        assert (deployed["version"], deployed["previous"]) == (f"{int(number) + 1:04d}", None)
    assert follower.look().state == "same"
    # How it is served is not in what a deployment brings: nothing is copied for it.
    for text in ("{", '{"port": 5001}'):
        (place.parent / "service.json").write_text(text)
        found = follower.look()
        assert (found.state, sorted(path.name for path in place.iterdir())) == ("away", ["0003", "0004"])
        assert "delete the deployment, and create it again" in found.words


def test_a_board_that_is_off_is_told_but_not_against_what_it_has(versions: tuple[str, str]) -> None:
    pytest.importorskip("asyncssh")
    client, tag, target = MlflowClient(), "foxnas.deployment.camera", f"edge://pi@127.0.0.1:{free_port()}"
    assert Follower(target, "camera", "foxnas-rpi4", "production").look().state == "away"
    assert client.get_model_version("foxnas-rpi4", "1").tags[tag].startswith(f"not yet on {target}: ")
    has = f"deployed on {target} as version 0007"
    client.set_model_version_tag("foxnas-rpi4", "1", tag, has)
    assert Follower(target, "camera", "foxnas-rpi4", "production").look().state == "away"
    assert client.get_model_version("foxnas-rpi4", "1").tags[tag] == has


def test_a_watch_logs_what_changed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("FOXNAS_WEBHOOK_SECRET", SECRET)
    stop, waits = threading.Event(), ["for a port", "for a port", "for space"]

    def look(*_: object, **__: object) -> Followed:
        words = waits.pop(0)
        if not waits:
            stop.set()
        return Followed("away", words)

    monkeypatch.setattr(Follower, "look", look)
    caplog.set_level("INFO", "foxnas_mlflow")
    asked = WatchRequest(model="foxnas-rpi4", target="edge://local", deployment="camera", port=0, every_s=0.01)
    assert run_watch(asked, stop=stop).state == "away"
    assert caplog.messages[1:] == ["for a port", "for space"]


def test_a_service_that_does_not_start_is_refused_and_not_copied_again(
    versions: tuple[str, str], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = iter(("busy", "service"))

    def deploy(*_: object, **__: object) -> None:
        raise RunnerRefusedError(next(kinds), "why", "local")

    follower = Follower(target, "camera", "foxnas-rpi4", "production")
    with monkeypatch.context() as patched:
        patched.setattr(Board, "deploy", deploy)
        # What a board has no memory or time for it may have at the next look.
        assert [follower.look().state for _ in range(3)] == ["away", "refused", "same"]
    assert follower.look().state == "same"
    assert follower.look(again=True).state == "updated"


def test_a_look_tells_what_was_deployed_without_an_answer(
    versions: tuple[str, str], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, tag, run = MlflowClient(), "foxnas.deployment.camera", LocalConnection.run

    def lost(connection: LocalConnection, argv: Sequence[str], *, timeout_s: float) -> Completed:
        done = run(connection, argv, timeout_s=timeout_s)
        if "activate" in argv:
            raise ConnectionLostError("the connection must last", received="local")
        return done

    follower = Follower(target, "camera", "foxnas-rpi4", "production", {"serve": "false"})
    with monkeypatch.context() as patched:
        patched.setattr(LocalConnection, "run", lost)
        assert follower.look().state == "away"
    words, others = "deployed on edge://local as version 0001", "deployed on edge://local as version 0007"
    client.set_model_version_tag("foxnas-rpi4", "1", tag, "refused on edge://local: no answer")
    # It is told once: edge://local is every board that watches from itself.
    for said, told in ((None, words), (others, others)):
        if said is not None:
            client.set_model_version_tag("foxnas-rpi4", "1", tag, said)
        assert follower.look().state == "same"
        assert client.get_model_version("foxnas-rpi4", "1").tags[tag] == told
    client.delete_model_version_tag("foxnas-rpi4", "1", tag)
    assert Follower(target, "camera", "foxnas-rpi4", "production").look().state == "same"
    assert client.get_model_version("foxnas-rpi4", "1").tags[tag] == words


def test_a_model_that_was_registered_anew_is_another_one(versions: tuple[str, str], target: str) -> None:
    client, board = MlflowClient(), get_deploy_client(target)
    follower = Follower(target, "camera", "foxnas-rpi4", "production", {"serve": "false"})
    assert [follower.look().state for _ in range(2)] == ["updated", "same"]
    other = model_id_of(client.get_model_version("foxnas-rpi4", "2"))
    client.delete_registered_model("foxnas-rpi4")
    mlflow.register_model(f"models:/{other}", "foxnas-rpi4")
    client.set_registered_model_alias("foxnas-rpi4", "production", "1")
    assert [follower.look().state for _ in range(2)] == ["updated", "same"]
    deployed = board.get_deployment("camera")
    assert (deployed["model_uri"], deployed["model_id"]) == ("models:/foxnas-rpi4/1", other)
    # A copy of a version is of the same model.
    client.copy_model_version("models:/foxnas-rpi4/1", "shelf")
    client.set_registered_model_alias("shelf", "production", "1")
    follower = Follower(target, "camera", "shelf", "production", {"serve": "false"})
    assert [follower.look().state for _ in range(2)] == ["updated", "same"]


@needs_sshd
def test_a_board_behind_ssh_follows_and_keeps_what_works(
    versions: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FOXNAS_WEBHOOK_SECRET", SECRET)
    client, port = MlflowClient(), free_port()

    def move(number: str) -> None:
        client.set_registered_model_alias("foxnas-rpi4", "production", number)
        body = json.dumps(EVENT).encode()
        assert post(f"http://127.0.0.1:{port}/", body, signed(body, name=f"{time.time()}", at=time.time())) == 202

    def told(number: str, words: str) -> bool:
        tag = client.get_model_version("foxnas-rpi4", number).tags.get("foxnas.deployment.camera", "")
        return tag.partition("?")[0].startswith(words)

    with ssh_target(tmp_path, monkeypatch) as (target, server):
        place, board = target.partition("?")[0], get_deploy_client(target)
        asked = WatchRequest(model="foxnas-rpi4", target=target, deployment="camera", port=port, every_s=0)
        with watching(asked) as results:
            assert wait_for(lambda: told("1", f"deployed on {place} as version 0001"))
            url = board.get_deployment("camera")["service"]["url"]
            move("2")
            assert wait_for(lambda: told("2", f"deployed on {place} as version 0002"))
            assert version_served(url) == "0002"
            # The board answers otherwise than this host: the version before is served, and the registry says why.
            raw = _bundle.Classifier.raw
            with monkeypatch.context() as patched:
                patched.setattr(_bundle.Classifier, "raw", lambda self, image: raw(self, image) + np.int8(3))
                move("1")
                assert wait_for(lambda: told("1", f"refused on {place}: the board"))
            assert version_served(url) == "0002"
            assert board.get_deployment("camera")["model_uri"] == "models:/foxnas-rpi4/2"
        # A board that is away refuses nothing: its turn comes with the next look.
        server.stop()
        client.set_registered_model_alias("foxnas-rpi4", "production", "1")
        words = ["watch", "--once", "--model", "foxnas-rpi4", "--target", target, "--deployment", "camera"]
        assert main(words) == 2
        assert "camera is not yet models:/foxnas-rpi4/1: " in capsys.readouterr().out
        assert version_served(url) == "0002"
        server.start()
        assert main(words) == 0
        assert version_served(url) == "0003"
        # Of a board that has a name of its own, a tag is put right by whoever looks.
        for said in (f"not yet on {place}: no answer", f"refused on {place}: no answer"):
            client.set_model_version_tag("foxnas-rpi4", "1", "foxnas.deployment.camera", said)
            assert main(words) == 0
            assert told("1", f"deployed on {place} as version 0003")
        client.set_model_version_tag(
            "foxnas-rpi4", "1", "foxnas.deployment.camera", "deployed on edge://pi@b as version 7"
        )
        assert main(words) == 0
        assert told("1", "deployed on edge://pi@b as version 7")
    assert [result.state for result in results] == ["refused"]


def version_served(url: str) -> str:
    return str(json.loads(request(f"{url}/info")[1])["version"])


def test_only_what_the_key_signed_comes_to_the_board(
    tracking: str, colour_model: TfliteModel, target: str, tmp_path: Path
) -> None:
    pytest.importorskip("model_signing", reason="the extra sign is not installed")
    private, public = make_key(tmp_path, "release")
    _, other = make_key(tmp_path, "other")
    client, board = MlflowClient(), get_deploy_client(target)
    for _ in range(2):
        with mlflow.start_run():
            log_model(colour_model, name="model", registered_model_name="foxnas-rpi4", code_paths=[])

    def look(version: str, key: str) -> str:
        client.set_registered_model_alias("foxnas-rpi4", "production", version)
        asked = {"model": "foxnas-rpi4", "target": target, "deployment": "camera", "once": True}
        return run_watch(WatchRequest(**asked, config=f"verify_key={key}")).state

    assert look("1", public) == "refused"
    assert main(["sign", "--model", "models:/foxnas-rpi4/1", "--signing-key", private]) == 0
    assert look("1", other) == "refused"
    assert board.list_deployments() == []
    assert look("1", public) == "updated"
    assert look("2", public) == "refused"
    assert "nobody signed it" in client.get_model_version("foxnas-rpi4", "2").tags["foxnas.deployment.camera"]
    assert board.get_deployment("camera")["model_uri"] == "models:/foxnas-rpi4/1"
    with pytest.raises(MlflowException, match="a key must be a PEM file"):
        board.update_deployment("camera", "models:/foxnas-rpi4/1", config={"verify_key": str(tmp_path / "none.pub")})


@pytest.mark.parametrize(
    ("changed", "secret", "words"),
    [
        ({"model": "models:/foxnas-rpi4/1"}, SECRET, "without version and alias"),
        ({"target": "ssh://pi@board"}, SECRET, "target must be a board, .*; edge://user@host is a board behind ssh"),
        ({"deployment": ""}, SECRET, "deployment must be given"),
        ({"config": "threads"}, SECRET, "config must be key=value"),
        ({}, "", "the webhook's secret must be in FOXNAS_WEBHOOK_SECRET, 16 characters or more; received none"),
        ({}, "short", "received 5 characters"),
        ({"certificate": __file__}, SECRET, "certificate must be a PEM file"),
        ({"port": 1, "host": "203.0.113.1"}, SECRET, "an address and a port that are free"),
    ],
)
def test_bad_input(changed: dict[str, str], secret: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOXNAS_WEBHOOK_SECRET", secret)
    values = {"model": "foxnas-rpi4", "target": "edge://local", "deployment": "camera", "port": 0, **changed}
    with pytest.raises(InvalidInputError, match=words):
        run_watch(WatchRequest(**values))
