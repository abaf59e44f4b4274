"""The command ``foxnas``: a subcommand for every MLproject entry point.

Exit status: 0 done, 2 bad input or a failure that the message explains, 3 a benchmark that is done and logged but
not valid, 130 or 143 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Mapping, Sequence

from foxnas_mlflow._version import __version__
from foxnas_mlflow.cli.options import add_workflow, requested, tell_on_stdout
from foxnas_mlflow.core.addresses import UNKNOWN_HOST
from foxnas_mlflow.core.errors import FoxNasError
from foxnas_mlflow.core.redaction import hide_login, redacted
from foxnas_mlflow.workflows import WORKFLOWS

_REMEDIES: Mapping[str, str] = {
    "UNAUTHENTICATED": "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    "PERMISSION_DENIED": "ask for that right; for runs, MLFLOW_EXPERIMENT_NAME can name an experiment of your own",
}
"""What to do about errors of MLflow; their codes, because importing MLflow is heavy."""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="foxnas",
        description="Hardware-aware neural architecture search with MLflow: find, prove, explain, measure, promote.",
        epilog="Exit status: 0 done; 2 bad input, or a failure that the message explains; 3 a benchmark that is done "
        "and logged, but not valid; 130 or 143 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"foxnas-mlflow {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for workflow in WORKFLOWS:
        add_workflow(subparsers, workflow)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status."""
    arguments = build_parser().parse_args(argv)
    hide_login()
    # MLflow's default of 7 retries hides an unreachable server for several minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    # Its bars for downloads of a few files would stand between our lines.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    tell_on_stdout()
    try:
        result = arguments.workflow.run(requested(arguments))
        print(redacted(result.describe()))
    except KeyboardInterrupt:
        how = "run the same command to continue (foxnas supernet: with --resume)"
        print(f"foxnas: interrupted; finished work is kept, {how}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`foxnas ... | head`): not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        message = _one_line(error)
        if arguments.debug or message is None:
            print(redacted(traceback.format_exc()), file=sys.stderr, end="")
            return 2 if message is not None else 1
        print(f"foxnas: {redacted(message)}", file=sys.stderr)
        return 2
    return int(result.exit_status)


def _one_line(error: Exception) -> str | None:
    """The line to print for an error that a user can mend, or None for a defect of ours."""
    if isinstance(error, FoxNasError):
        return str(error)
    # MLflow's errors (no such run, an unreachable server, a store that cannot be opened, an artifact
    # that is refused) carry the user's mistake in their first line; the classes are named, because
    # importing them is heavy.
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & {"MlflowException", "SQLAlchemyError"} or "/mlflow-artifacts/" in str(error):
        from foxnas_mlflow.tracking.registry import code_of, is_away, reason

        first = reason(error).rstrip(".")
        if UNKNOWN_HOST in first.lower():
            host = os.environ.get("MLFLOW_TRACKING_URI", "its address")
            return f"the tracking server does not know the host name in {host}; start it with --allowed-hosts NAME."
        if is_away(error):
            return (
                f"the tracking server does not answer as it should: {first}; check MLFLOW_TRACKING_URI and the server "
                "(foxnas doctor), then run the same command again: what is finished is kept."
            )
        remedy = _REMEDIES.get(code_of(error), "check MLFLOW_TRACKING_URI, the server and the rights")
        return f"the tracking store refused: {first}; {remedy}."
    if isinstance(error, OSError):
        place = f" ({error.filename})" if error.filename else ""
        return f"the operating system refused: {error.strerror or error}{place}; check space, rights and the path."
    return None
