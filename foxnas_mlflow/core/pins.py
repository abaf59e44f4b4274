"""The releases that this version is tested with."""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Mapping
from types import MappingProxyType


@functools.cache
def pins() -> Mapping[str, str]:
    """Releases by the name of their distribution, from ``pins.txt``, in its order."""
    text = importlib.resources.files("foxnas_mlflow").joinpath("pins.txt").read_text(encoding="utf-8")
    lines = (line.strip() for line in text.splitlines())
    return MappingProxyType(dict(line.split("==") for line in lines if line and not line.startswith("#")))
