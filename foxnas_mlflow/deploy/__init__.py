"""The deployment target ``edge`` of `mlflow.deployments`: registered models on boards.

MLflow asks a plugin for three things: one client class, `run_local` and `target_help`.
"""

from foxnas_mlflow.deploy._client import EdgeDeploymentClient, run_local, target_help

__all__ = ["EdgeDeploymentClient", "run_local", "target_help"]
