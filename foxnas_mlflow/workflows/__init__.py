"""The method, step by step: a module a step, each a request, a result and a function between them.

A step is called from Python as it is from the command line:

    from foxnas_mlflow.workflows import FitRequest, run_fit

    result = run_fit(FitRequest(measurements="measurements.csv", target="rpi4"))
    print(result.describe())

`run_main` is such a step too, and calls the others as functions. Importing a step imports nothing heavy. What a
step tells while it works goes to the logger ``foxnas_mlflow``, which the command line prints.
"""

from foxnas_mlflow.workflows import (
    benchmark,
    device,
    doctor,
    estimate,
    fit,
    init,
    lineage,
    main,
    promote,
    quantize,
    sample,
    search,
    sign,
    watch,
)
from foxnas_mlflow.workflows import supernet as _supernet
from foxnas_mlflow.workflows._request import Parameter, Request, parameter
from foxnas_mlflow.workflows._workflow import AnyWorkflow, Result, Workflow
from foxnas_mlflow.workflows.benchmark import BenchmarkRequest, BenchmarkResult, run_benchmark
from foxnas_mlflow.workflows.compare import CompareRequest, CompareResult, run_compare
from foxnas_mlflow.workflows.device import DeviceRequest, DeviceResult, run_device
from foxnas_mlflow.workflows.doctor import DoctorRequest, DoctorResult, run_doctor
from foxnas_mlflow.workflows.estimate import EstimateRequest, EstimateResult, run_estimate
from foxnas_mlflow.workflows.finetune import FinetuneRequest, FinetuneResult, run_finetune
from foxnas_mlflow.workflows.fit import FitRequest, FitStepResult, run_fit
from foxnas_mlflow.workflows.init import InitRequest, InitResult, run_init
from foxnas_mlflow.workflows.lineage import LineageRequest, LineageResult, run_lineage
from foxnas_mlflow.workflows.main import MainRequest, MainResult, run_main
from foxnas_mlflow.workflows.promote import PromoteRequest, PromoteResult, run_promote
from foxnas_mlflow.workflows.quantize import QuantizeRequest, QuantizeResult, run_quantize
from foxnas_mlflow.workflows.sample import SampleRequest, SampleResult, run_sample
from foxnas_mlflow.workflows.search import SearchRequest, SearchResult, run_search
from foxnas_mlflow.workflows.sign import SignRequest, SignResult, run_sign
from foxnas_mlflow.workflows.supernet import SupernetRequest, SupernetResult, run_supernet
from foxnas_mlflow.workflows.watch import WatchRequest, WatchResult, run_watch

WORKFLOWS: tuple[AnyWorkflow, ...] = tuple(
    module.WORKFLOW
    for module in (
        main,
        _supernet,
        sample,
        fit,
        search,
        quantize,
        benchmark,
        estimate,
        sign,
        promote,
        lineage,
        watch,
        doctor,
        device,
        init,
    )
)
"""All steps and tools, in the order of their use."""

__all__ = [
    "WORKFLOWS",
    "AnyWorkflow",
    "BenchmarkRequest",
    "BenchmarkResult",
    "CompareRequest",
    "CompareResult",
    "DeviceRequest",
    "DeviceResult",
    "DoctorRequest",
    "DoctorResult",
    "EstimateRequest",
    "EstimateResult",
    "FinetuneRequest",
    "FinetuneResult",
    "FitRequest",
    "FitStepResult",
    "InitRequest",
    "InitResult",
    "LineageRequest",
    "LineageResult",
    "MainRequest",
    "MainResult",
    "Parameter",
    "PromoteRequest",
    "PromoteResult",
    "QuantizeRequest",
    "QuantizeResult",
    "Request",
    "Result",
    "SampleRequest",
    "SampleResult",
    "SearchRequest",
    "SearchResult",
    "SignRequest",
    "SignResult",
    "SupernetRequest",
    "SupernetResult",
    "WatchRequest",
    "WatchResult",
    "Workflow",
    "parameter",
    "run_benchmark",
    "run_compare",
    "run_device",
    "run_doctor",
    "run_estimate",
    "run_finetune",
    "run_fit",
    "run_init",
    "run_lineage",
    "run_main",
    "run_promote",
    "run_quantize",
    "run_sample",
    "run_search",
    "run_sign",
    "run_supernet",
    "run_watch",
]
