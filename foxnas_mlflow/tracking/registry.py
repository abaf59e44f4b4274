"""Registered model versions."""

from __future__ import annotations

from collections.abc import Mapping

from mlflow import MlflowClient


def tag_version(name: str, version: str | int | None, tags: Mapping[str, str]) -> None:
    """Set tags of a registered model version."""
    if version is None:
        return
    client = MlflowClient()
    for key, value in tags.items():
        client.set_model_version_tag(name, str(version), key, value)
