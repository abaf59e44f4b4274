"""Workers on a Ray cluster: the same interface as processes of this machine.

A worker is an actor with one processor. A board that the cluster has as a custom resource, named by its address
(``ray start --resources '{"ssh://pi@board": 1}'`` on the node that reaches it), is measured from that node, by one
actor of all that share the cluster.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from foxnas_mlflow._version import __version__
from foxnas_mlflow.core.errors import InvalidInputError, WorkerLostError, import_or_raise
from foxnas_mlflow.core.workers import Executor, Make, Worker

T = TypeVar("T")
R = TypeVar("R")

ANSWER_SECONDS = 10.0
"""How long a cluster may take to accept a connection."""

START_SECONDS = 120.0
"""How long a worker may take to be made: it reads weights and images, or connects to a board."""

NO_ROOM_SECONDS = 5.0
"""How long the cluster may lack what its workers need, before one that waits for it is lost: a node is gone."""


@contextlib.contextmanager
def open_ray(address: str, *, workers: int) -> Iterator[Executor]:
    """Connect to a cluster, or start one on this machine, and see that it can do the work.

    Args:
        address: ``host:port`` of a cluster's head, ``auto``, or ``ray://host:port``; empty: ``RAY_ADDRESS``, else a
            cluster of this machine alone, which ends with the work.
        workers: How many workers it must have room for.

    Raises:
        InvalidInputError: If it does not answer, a node lacks this package or has another version of it or of Python,
            or there are fewer processors than workers.
        MissingDependencyError: If Ray is not installed.
    """
    ray: Any = import_or_raise("ray", extra="ray", feature="executor=ray")
    address = address or os.environ.get("RAY_ADDRESS", "")
    _check_answer(address)
    # What it tells on standard error is for its own logs, in /tmp/ray.
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    options |= {"address": address} if address else {"include_dashboard": False}
    try:
        ray.init(**options)
    except (OSError, RuntimeError, ValueError) as error:
        raise _no_cluster(address or "a cluster of this machine", str(error)) from error
    try:
        _check_nodes(ray)
        n_processors = int(ray.cluster_resources().get("CPU", 0))
        if workers > n_processors:
            raise InvalidInputError(
                "each worker needs a processor of the Ray cluster",
                received=f"{workers} workers, {n_processors} processors",
                remedy="give fewer workers, or add nodes",
            )
        yield RayExecutor(ray)
    finally:
        ray.shutdown()


def _check_answer(address: str) -> None:
    """Refuse an address that nobody listens at: Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not address or address in ("auto", "local"):
        return
    if not colon or not port.isdigit() or not host:
        raise InvalidInputError("ray_address must be host:port, ray://host:port or auto", received=address)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, str(error)) from error


def _no_cluster(address: str, reason: str) -> InvalidInputError:
    lines = reason.strip().splitlines() or ["no answer"]
    return InvalidInputError(
        "a Ray cluster must answer at ray_address",
        received=f"{address}: {lines[0]}",
        remedy="start its head with: ray start --head, and check host, port (6379) and the versions of Ray and Python",
    )


def _check_nodes(ray: Any) -> None:
    """Every node must have this package in this version."""
    strategy = import_or_raise("ray.util.scheduling_strategies", extra="ray", feature="executor=ray")

    # Not one of this module, which a node without the package could not load.
    def version() -> str:
        try:
            import foxnas_mlflow

            return str(foxnas_mlflow.__version__)
        except ImportError:
            return ""

    version.__module__ = "__main__"
    asked = {}
    for node in ray.nodes():
        if node["Alive"]:
            here = strategy.NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            task = ray.remote(version).options(num_cpus=0, scheduling_strategy=here)
            asked[node["NodeManagerAddress"]] = task.remote()
    for node, answer in asked.items():
        found = ray.get(answer)
        if found != __version__:
            raise InvalidInputError(
                f"every node of the Ray cluster must have foxnas-mlflow {__version__}, as this machine",
                received=f"{node} has {found or 'none'}",
                remedy=f"pip install 'foxnas-mlflow[train,device]=={__version__}' there, for the Python that runs Ray",
            )


class RayExecutor(Executor):
    """Actors of a cluster that is connected."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._sent: tuple[Any, Any] = (None, None)
        self._started: list[_Actor[Any, Any]] = []

    def threads(self, n: int) -> int:
        """One: a worker has one processor."""
        return 1

    def has(self, resource: str) -> bool:
        """Whether a node of the cluster has a custom resource."""
        return bool(self._ray.cluster_resources().get(resource, 0))

    def start(self, make: Make[T, R], *, resource: str = "") -> Worker[T, R]:
        """An actor, started by its first call."""
        # Weights and images are sent once for all workers.
        if self._sent[0] is not make:
            self._sent = make, self._ray.put(make)
        needs = {"num_cpus": 0, "resources": {resource: 1}} if resource else {"num_cpus": 1}
        return _Actor(self._ray, self._sent[1], needs, self._started)


class _Work:
    """What an actor is."""

    def __init__(self, make: Any) -> None:
        self._work = make()

    def ready(self) -> None:
        """Answer once it is made."""

    def do(self, item: Any) -> Any:
        """Do an item."""
        return self._work(item)


class _Actor(Worker[T, R]):
    """One of those that are started, all of which need room at the same time."""

    def __init__(self, ray: Any, make: Any, needs: Mapping[str, Any], started: list[_Actor[Any, Any]]) -> None:
        self._ray, self._make, self._needs, self._started = ray, make, needs, started
        self._handle: Any = None

    def __call__(self, item: T) -> R:
        errors = self._ray.exceptions
        try:
            if self._handle is None:
                self._start()
            result: R = self._ray.get(self._handle.do.remote(item))
        except errors.RayTaskError as error:
            # What the work raised, apart from Ray's wrapping.
            raise getattr(error, "cause", None) or error from error
        except (errors.RayActorError, errors.RaySystemError, errors.ObjectLostError) as error:
            self.close()
            raise _lost(type(error).__name__) from error
        return result

    def _start(self) -> None:
        self._handle = self._ray.remote(_Work).options(**self._needs).remote(self._make)
        self._started.append(self)
        ready = self._handle.ready.remote()
        begun = fitted = time.monotonic()
        while not self._ray.wait([ready], timeout=1)[0]:
            now = time.monotonic()
            if self._fits():
                fitted = now
            if now - fitted > NO_ROOM_SECONDS or now - begun > START_SECONDS:
                self.close()
                raise _lost("no room in the cluster" if now - fitted > NO_ROOM_SECONDS else "it was not made in time")
        self._ray.get(ready)

    def _fits(self) -> bool:
        """Whether the cluster has what all that are started need."""
        needed: Counter[str] = Counter()
        for actor in tuple(self._started):
            needed["CPU"] += actor._needs["num_cpus"]
            needed.update(actor._needs.get("resources", {}))
        there = self._ray.cluster_resources()
        return all(there.get(name, 0) >= amount for name, amount in needed.items())

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            self._started.remove(self)
            with contextlib.suppress(Exception):
                self._ray.kill(handle)


def _lost(why: str) -> WorkerLostError:
    return WorkerLostError(
        "a worker of the Ray cluster must not end before its work",
        received=why,
        remedy="see its nodes with: ray status; where memory is short, give fewer workers",
    )
