"""Pages and plots: what a person would rather see than read. No MLflow in here."""

from foxnas_mlflow.report._benchmark import write_benchmark_report
from foxnas_mlflow.report._confusion import draw_confusion_matrix
from foxnas_mlflow.report._pipeline import PipelinePage, write_pipeline_report
from foxnas_mlflow.report._plots import draw_front, write_predictor_files
from foxnas_mlflow.report._search import write_search_report, write_searches_report

__all__ = [
    "PipelinePage",
    "draw_confusion_matrix",
    "draw_front",
    "write_benchmark_report",
    "write_pipeline_report",
    "write_predictor_files",
    "write_search_report",
    "write_searches_report",
]
