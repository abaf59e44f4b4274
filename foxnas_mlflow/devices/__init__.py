"""Connections to boards, and measurements on them that say when they cannot be trusted."""

from foxnas_mlflow.devices._base import Completed, Connection
from foxnas_mlflow.devices._benchmark import (
    Benchmark,
    invalid_reasons,
    subnet_timing,
    undisturbed,
    what_helps,
    with_energy,
    with_threads,
)
from foxnas_mlflow.devices._check import DeviceCheck, Finding, check
from foxnas_mlflow.devices._connect import connect
from foxnas_mlflow.devices._local import LocalConnection
from foxnas_mlflow.devices._measure import host_answer, measure, read_model, require_meter
from foxnas_mlflow.devices._vela import ACCELERATORS, VelaEstimate, estimate_latency_vela

__all__ = [
    "ACCELERATORS",
    "Benchmark",
    "Completed",
    "Connection",
    "DeviceCheck",
    "Finding",
    "LocalConnection",
    "VelaEstimate",
    "check",
    "connect",
    "estimate_latency_vela",
    "host_answer",
    "invalid_reasons",
    "measure",
    "read_model",
    "require_meter",
    "subnet_timing",
    "undisturbed",
    "what_helps",
    "with_energy",
    "with_threads",
]
