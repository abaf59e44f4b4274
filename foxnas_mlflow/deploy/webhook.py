"""Receiving MLflow's registry webhooks: what is signed, fresh and new is told, all else is refused.

A delivery is a POST with three headers and a JSON body (MLflow's form of https://www.standardwebhooks.com):

| header                 | what                                                                      |
|------------------------|---------------------------------------------------------------------------|
| X-MLflow-Delivery-Id   | name of the delivery; the same when a delivery that failed is tried again |
| X-MLflow-Timestamp     | when it was signed, Unix seconds                                          |
| X-MLflow-Signature     | ``v1,`` and base64 of HMAC-SHA256 over ``id.timestamp.body``              |
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from foxnas_mlflow.core.errors import FoxNasError, InvalidInputError
from foxnas_mlflow.deploy.service import Patient

SIGNATURE, TIMESTAMP, DELIVERY_ID = "X-MLflow-Signature", "X-MLflow-Timestamp", "X-MLflow-Delivery-Id"

FRESH_SECONDS = 300
"""How old a signature may be, and how far in the future: clocks differ, and failed deliveries are tried again."""

_MOST_BYTES = 1 << 20
_READ_SECONDS = 10.0

logger = logging.getLogger("foxnas_mlflow")


class DeliveryRefusedError(FoxNasError):
    """A delivery that is not the registry's, not fresh, or not new.

    Attributes:
        status: HTTP status of the answer.
    """

    def __init__(self, status: int, rule: str) -> None:
        super().__init__(rule)
        self.status = status


class Deliveries:
    """Tells the registry's own deliveries from all else.

    Args:
        secret: What the webhook was made with.
    """

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()
        self._seen: dict[str, float] = {}
        self._lock = threading.Lock()

    def check(self, headers: Mapping[str, str], body: bytes, now: float) -> Any:
        """The JSON value of a delivery.

        Args:
            headers: Headers of the request.
            body: Its body, as it came.
            now: Unix seconds.

        Raises:
            DeliveryRefusedError: If it is unsigned, wrongly signed, older than `FRESH_SECONDS`, was accepted before, or
                is no JSON.
        """
        sent = {key.lower(): value for key, value in headers.items()}
        name, stamp, signatures = (sent.get(key.lower(), "") for key in (DELIVERY_ID, TIMESTAMP, SIGNATURE))
        expected = hmac.new(self._secret, f"{name}.{stamp}.".encode() + body, hashlib.sha256).digest()
        signed = b"v1," + base64.b64encode(expected)
        # A sender that changes its secret signs with both for a while.
        if not any(hmac.compare_digest(signature.encode(), signed) for signature in signatures.split()):
            raise DeliveryRefusedError(401, f"a delivery must be signed with the webhook's secret ({SIGNATURE})")
        if not re.fullmatch(r"[0-9]{1,12}", stamp) or abs(now - int(stamp)) > FRESH_SECONDS:
            raise DeliveryRefusedError(401, f"a delivery must have been signed within {FRESH_SECONDS} s ({TIMESTAMP})")
        try:
            value = json.loads(body)
        except ValueError:
            raise DeliveryRefusedError(400, "a delivery must be JSON") from None
        with self._lock:
            # What is older is refused for its age.
            self._seen = {key: at for key, at in self._seen.items() if now - at <= 2 * FRESH_SECONDS}
            if name in self._seen:
                raise DeliveryRefusedError(409, f"a delivery is taken once ({DELIVERY_ID})")
            self._seen[name] = now
        return value


@contextlib.contextmanager
def receiving(
    secret: str, host: str, port: int, told: Callable[[Any], str], *, certificate: Path | None = None
) -> Iterator[str]:
    """Receive deliveries in threads while the block runs; ``GET /ping`` answers too.

    Args:
        secret: What the webhook was made with.
        host: Address to listen at.
        port: Port; 0: any that is free.
        told: Given the value of each accepted delivery, in a thread; what it returns is answered. It must be quick:
            MLflow waits for the answer.
        certificate: PEM file of a certificate and its key, for https.

    Yields:
        The URL.

    Raises:
        InvalidInputError: If the address is taken or the certificate cannot be read.
    """
    deliveries = Deliveries(secret)

    class Handler(BaseHTTPRequestHandler):
        timeout = _READ_SECONDS

        def do_GET(self) -> None:
            known = self.path.rstrip("/") == "/ping"
            self._answer(200 if known else 404, {"status": "receiving"} if known else {"error": "GET /ping, POST /"})

        def do_POST(self) -> None:
            try:
                length = self.headers.get("Content-Length") or ""
                if not length.isdecimal() or int(length) > _MOST_BYTES:
                    raise DeliveryRefusedError(413, f"a delivery has its length and at most {_MOST_BYTES} bytes")
                value = deliveries.check(dict(self.headers), self.rfile.read(int(length)), time.time())
                self._answer(202, {"status": told(value)})
            except DeliveryRefusedError as error:
                logger.info("refused a delivery of %s: %s", self.client_address[0], error)
                self._answer(error.status, {"error": str(error)})

        def _answer(self, status: int, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def version_string(self) -> str:
            return "foxnas"

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(Patient):
        allow_reuse_address = True
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        def handle_error(self, request: Any, client_address: Any) -> None:
            # A sender that went away, or one that does not speak TLS.
            logger.debug("a connection of %s failed", client_address, exc_info=True)

    place = f"[{host}]" if ":" in host else host
    try:
        server = Server((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise InvalidInputError(
            f"the receiver needs an address and a port that are free ({getattr(error, 'strerror', None) or error})",
            received=f"{place}:{port}",
            remedy="give others with --host and --port",
        ) from None
    try:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            try:
                context.load_cert_chain(certificate)
            except OSError as error:
                raise InvalidInputError(
                    "certificate must be a PEM file of a certificate and its key", received=f"{certificate}: {error}"
                ) from None
            # The handshake is done by the connection's own thread.
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        try:
            yield f"http{'s' if certificate else ''}://{place}:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()
    finally:
        server.server_close()
