"""What one look at a picture tells: whether it is whole, its content, its statistics, and its pixels at some sizes.

Files are looked at by processes of their own that speak over their standard streams: they start nothing of the program
that started them, and one that a damaged file brings down takes nothing along.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.errors import InvalidInputError, import_or_raise
from foxnas_mlflow.core.processors import n_processors
from foxnas_mlflow.data.preprocess import decode_each, resize

FACTS = np.dtype(
    [
        ("key", "u8"),  # of name, size and time of change
        ("content", "u8", (2,)),  # digest of the bytes
        ("look", "u8", (2,)),  # where it gets lighter to the right and downwards; 0 of a flat picture
        ("mean", "f4", (3,)),  # of each channel in 0..1
        ("square", "f4", (3,)),  # mean of its squares
        ("whole", "?"),  # whether it can be decoded to its end
    ]
)
"""What is kept of a picture, 65 bytes."""

LOOKS = np.dtype([("content", "u8", (2,)), ("look", "u8", (2,))])
"""What a data set keeps of a picture, 32 bytes."""

STATISTICS_SIDE = 64
"""Shorter side in pixels that statistics need; a JPEG of more than three times that is decoded at a reduced size."""

_FEW = 64
"""So many files are looked at sooner than a process starts."""

_CHUNKS, _LARGEST_CHUNK = 64, 256
"""A process is given so many parts one after the other, none of more pictures."""

_LEVELS = np.arange(256) / 255.0
_LEAST_CONTRAST = 8

Output = tuple[int, str]
"""A size in pixels, and the file that takes (rows, size, size, 3) as uint8."""


def look(path: str, sizes: Sequence[int]) -> tuple[NDArray[Any], list[NDArray[np.uint8]]]:
    """Decode a picture once.

    Args:
        path: Its file.
        sizes: Sizes in pixels.

    Returns:
        Its facts, shape (), without a key; and its pixels at each size as `resize` gives them, none of a damaged one.
    """
    facts = np.zeros((), FACTS)
    try:
        data = Path(path).read_bytes()
    except OSError:
        return facts, []
    facts["content"] = np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), "u8")
    try:
        small, *decoded = decode_each(data, (STATISTICS_SIDE, *sizes))
        pixels = [resize(image, size) for image, size in zip(decoded, sizes, strict=True)]
    except (InvalidInputError, OSError, MemoryError):
        return facts, []
    picture = import_or_raise("PIL.Image", extra="train", feature="reading images").fromarray(small)
    counts = np.array(picture.histogram(), np.float64).reshape(3, 256) / (small.shape[0] * small.shape[1])
    facts["mean"], facts["square"] = counts @ _LEVELS, counts @ _LEVELS**2
    facts["look"] = _look_of(np.asarray(picture.convert("L").resize((9, 9), 2, reducing_gap=2.0)).astype(np.int16))
    facts["whole"] = True
    return facts, pixels


def _look_of(grey: NDArray[np.int16]) -> NDArray[np.uint64]:
    if int(grey.max()) - int(grey.min()) < _LEAST_CONTRAST:
        return np.zeros(2, np.uint64)
    lighter = np.stack([np.diff(grey[:8], axis=1) > 0, np.diff(grey[:, :8], axis=0) > 0])
    return np.packbits(lighter).view("u8")


def look_at(paths: Sequence[str], outputs: Sequence[Output], rows: Sequence[int]) -> NDArray[Any]:
    """Look at some pictures and write their pixels to the rows of files.

    Args:
        paths: Their files.
        outputs: Sizes, and files that exist.
        rows: Row of each picture in every file.

    Returns:
        Facts, shape (n,).
    """
    sizes = [size for size, _ in outputs]
    facts = np.zeros(len(paths), FACTS)
    with contextlib.ExitStack() as stack:
        # What Pillow warns of, file after file (their size, odd palettes), the facts tell.
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        files = [stack.enter_context(open(name, "r+b", buffering=0)) for _, name in outputs]
        for i, (path, row) in enumerate(zip(paths, rows, strict=True)):
            facts[i], pixels = look(path, sizes)
            for file, image in zip(files, pixels, strict=False):
                file.seek(row * image.nbytes)
                file.write(image.tobytes())
    return facts


def look_at_all(
    paths: Sequence[Path],
    outputs: Sequence[Output] = (),
    rows: NDArray[np.int64] | None = None,
    *,
    n_processes: int | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> NDArray[Any]:
    """`look_at` in as many processes as there are processors.

    Args:
        paths: Files of the pictures.
        outputs: Sizes, and files that exist.
        rows: Row of each picture in every file; None: in order.
        n_processes: Processes; None: one a processor.
        progress: Told how many more are done.

    Returns:
        Facts, shape (n,).
    """
    places = np.arange(len(paths)) if rows is None else rows
    facts = np.zeros(len(paths), FACTS)
    n = n_processes or n_processors()
    size = min(max(len(paths) // (n * _CHUNKS), 1), _LARGEST_CHUNK)
    workers: SimpleQueue[_Process] = SimpleQueue()
    processes = [_Process() for _ in range(n if len(paths) > _FEW else 0)]
    for process in processes:
        workers.put(process)

    def chunk(start: int) -> None:
        part = slice(start, min(start + size, len(paths)))
        task = ([str(paths[i]) for i in range(part.start, part.stop)], list(outputs), places[part].tolist())
        if processes:
            process = workers.get()
            try:
                facts[part] = process.look_at(*task)
            finally:
                workers.put(process)
        else:
            facts[part] = look_at(*task)
        progress(part.stop - part.start)

    try:
        with ThreadPoolExecutor(max(len(processes), 1)) as threads:
            for _ in threads.map(chunk, range(0, len(paths), size)):
                pass
    finally:
        for process in processes:
            process.close()
    return facts


class _Process:
    """A process that looks at pictures; another takes its place when one of them brings it down."""

    def __init__(self) -> None:
        self._process = self._started()

    def look_at(self, paths: list[str], outputs: list[Output], rows: list[int]) -> NDArray[Any]:
        """The function of that name, over there."""
        try:
            return self._asked(paths, outputs, rows)
        except (EOFError, OSError, pickle.UnpicklingError):
            self.close()
            self._process = self._started()
        if len(paths) == 1:
            return np.zeros(1, FACTS)
        one_by_one = [self.look_at([path], outputs, [row]) for path, row in zip(paths, rows, strict=True)]
        return np.concatenate(one_by_one)

    def close(self) -> None:
        """End it."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._process.wait()

    def _asked(self, *task: Any) -> NDArray[Any]:
        if self._process.stdin is None or self._process.stdout is None:
            raise EOFError
        pickle.dump(task, self._process.stdin)
        self._process.stdin.flush()
        answer = pickle.load(self._process.stdout)  # noqa: S301
        if isinstance(answer, Exception):
            raise InvalidInputError("decoded images must be written", received=str(answer)) from answer
        facts: NDArray[Any] = answer
        return facts

    def _started(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        return subprocess.Popen(
            [sys.executable, "-c", "from foxnas_mlflow.data._look import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )


def serve() -> None:
    """Look at what standard input names until it ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # What a library prints is no answer.
    while True:
        try:
            task = pickle.load(sys.stdin.buffer)  # noqa: S301
        except (EOFError, KeyboardInterrupt):
            return
        try:
            answer: Any = look_at(*task)
        except OSError as error:
            answer = error
        except KeyboardInterrupt:
            return
        pickle.dump(answer, answers)
        answers.flush()
