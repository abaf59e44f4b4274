"""The method, step by step: a module a step, each a request, a result and a function between them.

A step is called from Python as it is from the command line:

    from foxnas_mlflow.workflows import FitRequest, run_fit

    result = run_fit(FitRequest(measurements="measurements.csv", target="rpi4"))
    print(result.describe())

`main` is such a step too, and calls the others as functions. Importing a step imports nothing heavy.
"""

from foxnas_mlflow.workflows._request import Parameter, Request, parameter
from foxnas_mlflow.workflows._workflow import AnyWorkflow, Result, Workflow
from foxnas_mlflow.workflows.fit import WORKFLOW as _FIT
from foxnas_mlflow.workflows.fit import FitRequest, FitStepResult, run_fit

WORKFLOWS: tuple[AnyWorkflow, ...] = (_FIT,)
"""All steps and tools, in the order of their use."""

__all__ = [
    "WORKFLOWS",
    "AnyWorkflow",
    "FitRequest",
    "FitStepResult",
    "Parameter",
    "Request",
    "Result",
    "Workflow",
    "parameter",
    "run_fit",
]
