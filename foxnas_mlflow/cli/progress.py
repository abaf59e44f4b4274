"""A bar on a terminal; nothing where output goes to a file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(label: str, unit: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show how far a long work is, with the time left.

    Yields:
        A function of the units done, all units, and a word on the state.
    """
    from tqdm import tqdm

    with tqdm(desc=label, unit=unit, disable=None, dynamic_ncols=True) as bar:

        def show(done: int, total: int, state: str) -> None:
            if bar.total is None:
                # What an earlier run did must not make this one look fast.
                bar.total, bar.initial, bar.n = total, done - 1, done - 1
            bar.set_postfix_str(state, refresh=False)
            bar.update(done - bar.n)

        yield show
