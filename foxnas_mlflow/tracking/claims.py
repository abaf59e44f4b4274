"""Who works on a step: one pipeline at a time, on whichever host, without a lock that a crash leaves behind.

A pipeline that is about to do a step writes the step's digest to a tag of its own run, and then looks for others
with the same tag: it works only if it sees none. Two that write at once see each other and both step back for a
while of random length; that both work cannot be, because the later of two writes comes before its own look.

A claim ends with its run. A process of this host that is gone is known to be; of another host, and of a process that
the system hides, the heartbeat tells, a tag that changes every `BEAT_SECONDS`: one that stays the same for
`DEAD_SECONDS` (of this host's clock: clocks are not compared) ends as KILLED, with its steps.

| tag of a pipeline's run | meaning                                                |
|-------------------------|--------------------------------------------------------|
| foxnas.claim            | digest of the step that it works on; empty between two |
| foxnas.heartbeat        | when its process was last known to be at work          |
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from foxnas_mlflow.tracking.process import PROCESS_TAG, is_dead
from foxnas_mlflow.tracking.run import best_effort

CLAIM_TAG = "foxnas.claim"
HEARTBEAT_TAG = "foxnas.heartbeat"

BEAT_SECONDS = 20.0
DEAD_SECONDS = 180.0


class Claims:
    """The claims of one pipeline's run.

    Args:
        run_id: The run.
        experiment_id: Its experiment, among whose runs others are looked for.
    """

    def __init__(self, run_id: str, experiment_id: str) -> None:
        self._run_id, self._experiment_id = run_id, experiment_id
        self._client = MlflowClient()
        self._beats: dict[str, tuple[str, float]] = {}

    def take(self, digest: str) -> Run | None:
        """Claim a step: None when it is this run's, else the run that works on it."""
        self._client.set_tag(self._run_id, CLAIM_TAG, digest)
        other = self._other(digest)
        if other is not None:
            self.release()
        return other

    def release(self) -> None:
        """Give up what is claimed; an empty tag is no claim."""
        self._client.set_tag(self._run_id, CLAIM_TAG, "")

    def _other(self, digest: str) -> Run | None:
        """A run at work that claims the same step; those that are found dead are ended."""
        found = self._client.search_runs(
            [self._experiment_id], f"tags.`{CLAIM_TAG}` = '{digest}' and attributes.status = 'RUNNING'"
        )
        for run in found:
            if run.info.run_id == self._run_id:
                continue
            if not self._is_dead(run):
                return run
            self._end(run.info.run_id)
        return None

    def _is_dead(self, run: Run) -> bool:
        if (dead := is_dead(run.data.tags.get(PROCESS_TAG, ""))) is not None:
            return dead
        beat, now = run.data.tags.get(HEARTBEAT_TAG, ""), time.monotonic()
        before, since = self._beats.setdefault(run.info.run_id, (beat, now))
        if before != beat:
            self._beats[run.info.run_id] = (beat, now)
            return False
        return now - since > DEAD_SECONDS

    def _end(self, run_id: str) -> None:
        steps = self._client.search_runs(
            [self._experiment_id], f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{run_id}' and attributes.status = 'RUNNING'"
        )
        for ended in (*(step.info.run_id for step in steps), run_id):
            self._client.set_terminated(ended, "KILLED")


@contextlib.contextmanager
def heartbeat(run_id: str) -> Iterator[None]:
    """Show that this process is at work on a run while the block runs; a server that is away stops nothing."""
    client, ended = MlflowClient(), threading.Event()
    beat = best_effort(lambda: client.set_tag(run_id, HEARTBEAT_TAG, datetime.now(UTC).isoformat()))

    def go_on() -> None:
        while not ended.wait(BEAT_SECONDS):
            beat()

    beat()
    thread = threading.Thread(target=go_on, name="foxnas-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
