"""Which version held a stage when: entries in tags of the registered model.

Every move is one tag of its own, ``foxnas.production.2026-11-25T09:30:00.000000Z``: two processes
that write at once never lose an entry, which a list in one tag would. The history is kept where the
registry is, survives the deletion of runs, and reads without this package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from foxnas_mlflow.core.errors import InvalidInputError

_TIME = "%Y-%m-%dT%H:%M:%S.%fZ"


@dataclass(frozen=True, slots=True)
class Entry:
    """From a moment on, a version holds the stage.

    Attributes:
        since: The moment, in UTC.
        version: The version, or None when nobody holds the stage any more.
        action: ``promote``, ``rollback``, ``archive``, or ``outside`` when somebody else moved the
            alias and it was noticed later.
        run_id: Run of the promotion, if there is one.
    """

    since: datetime
    version: str | None
    action: str
    run_id: str = ""

    def tag(self, alias: str) -> tuple[str, str]:
        """Key and value of the tag that keeps it."""
        value = {"version": self.version, "action": self.action, "run_id": self.run_id}
        return f"foxnas.{alias}.{self.since.strftime(_TIME)}", json.dumps(value)


@dataclass(frozen=True, slots=True)
class Interval:
    """A version held a stage for a time; `until` is None for the present holder."""

    version: str | None
    since: datetime
    until: datetime | None
    action: str
    run_id: str


def read_history(tags: Mapping[str, str], alias: str) -> list[Entry]:
    """Entries in order of time; entries that repeat the version before them are one."""
    prefix = f"foxnas.{alias}."
    entries: list[Entry] = []
    for key in sorted(tags):
        if not key.startswith(prefix):
            continue
        try:
            since = datetime.strptime(key.removeprefix(prefix), _TIME).replace(tzinfo=UTC)
            value = json.loads(tags[key])
            entry = Entry(since, value["version"], value["action"], value.get("run_id", ""))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # somebody else's tag
        if entries and entries[-1].version == entry.version:
            # Two clients noted one move: the one who made it knows more.
            if entries[-1].action == "outside":
                entries[-1] = Entry(entries[-1].since, entry.version, entry.action, entry.run_id)
            continue
        entries.append(entry)
    return entries


def next_moment(entries: Sequence[Entry]) -> datetime:
    """Now, or right after the last entry where another machine's clock is ahead."""
    now = datetime.now(UTC)
    return max(now, entries[-1].since + timedelta(microseconds=1)) if entries else now


def intervals(entries: Sequence[Entry]) -> list[Interval]:
    """Who held the stage from when until when."""
    ends = [entry.since for entry in entries[1:]] + [None]
    return [Interval(e.version, e.since, end, e.action, e.run_id) for e, end in zip(entries, ends, strict=True)]


def held_on(entries: Sequence[Entry], moment: str) -> list[Interval]:
    """Who held the stage at a moment, or in turn during a day.

    Args:
        entries: The history.
        moment: ISO 8601: a date is the whole day, a time without zone is UTC.

    Raises:
        InvalidInputError: If it is neither.
    """
    try:
        start = datetime.fromisoformat(moment)
    except ValueError:
        raise InvalidInputError("date must be ISO 8601, like 2026-11-25 or 2026-11-25T09:30", received=moment) from None
    start = start.replace(tzinfo=UTC) if start.tzinfo is None else start.astimezone(UTC)
    whole_day = len(moment.strip()) <= len("2026-11-25")
    end = start + (timedelta(days=1) if whole_day else timedelta(microseconds=1))
    return [
        i
        for i in intervals(entries)
        if i.version is not None and i.since < end and (i.until is None or i.until > start)
    ]


def former_versions(entries: Sequence[Entry]) -> list[str]:
    """Versions to roll back to, the nearest first.

    A rollback takes the version that it left off the list, so that two rollbacks go two back.
    """
    stack: list[str] = []
    for entry in entries:
        if entry.version is None:
            # What was withdrawn is nothing to go back to.
            stack = stack[:-1]
        elif entry.action == "rollback" and entry.version in stack:
            del stack[stack.index(entry.version) + 1 :]
        else:
            if entry.version in stack:
                stack.remove(entry.version)
            stack.append(entry.version)
    current = entries[-1].version if entries else None
    return [version for version in reversed(stack) if version != current]
