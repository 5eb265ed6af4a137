"""Encoded images of a source in shared memory, once for all processes of a machine.

They are stored in an anonymous file in memory (memfd). A process opens it through the process that filled it
(`/proc/<pid>/fd/<n>`). The system frees it when the last process that has it open ends for any reason, so a crash
leaves nothing behind.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import psutil
from tqdm import tqdm

from common.errors import UserError
from data.decoding import DECODE_ERRORS
from data.source import Request, Source, encoded

_THREADS = 16
_CHUNK = 256  # images that a thread loads at a time
_CGROUP = Path("/sys/fs/cgroup")

T = TypeVar("T")
# (name, action) → the action's result, a string; one process runs it for all processes of this machine.
Once = Callable[[str, Callable[[], str]], str]


def alone(name: str, action: Callable[[], str]) -> str:
    """Run `action`: the `Once` of a single process."""
    return action()


class MemorySource(Source):
    """A source with its encoded images in a file in memory: N + 1 offsets (int64), then the images, one after the other."""

    def __init__(self, source: Source, file: BinaryIO) -> None:
        super().__init__(source.labels, source.class_names)
        self.num_classes, self.classes, self._source = source.num_classes, source.classes, source
        self.of_folders = source.of_folders
        self._open(file)

    def _open(self, file: BinaryIO) -> None:
        self._file, count = file, len(self) + 1
        self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._offsets = np.frombuffer(self._content, np.int64, count) + 8 * count

    def image(self, i: int) -> bytes:
        return self._content[self._offsets[i] : self._offsets[i + 1]]

    def name(self, i: int) -> str:
        return self._source.name(i)

    def key(self, i: int) -> str:
        return self._source.key(i)

    def size(self, i: int) -> int:
        return int(self._offsets[i + 1] - self._offsets[i])

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a process that is spawned while this one lives: it opens the same memory."""
        state = {key: value for key, value in self.__dict__.items() if key not in ("_file", "_content", "_offsets")}
        return state | {"_path": _path(self._file)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        path = state.pop("_path")
        self.__dict__.update(state)
        self._open(open(path, "rb"))


def _path(file: BinaryIO) -> str:
    return f"/proc/{os.getpid()}/fd/{file.fileno()}"


def load_into_memory(source: Source, request: Request, *, once: Once, progress: bool) -> MemorySource:
    """Load the source into memory that all processes of this machine share.

    Raises:
        UserError: it does not fit, a file changed while it was read, or another process's memory cannot be opened.
    """
    filled: list[BinaryIO] = []

    def fill() -> str:
        filled.append(_fill(source, request, progress))
        return _path(filled[0])

    path = once(f"{request.spec} {request.split}", fill)
    try:
        file = filled[0] if filled else open(path, "rb")
    except OSError as error:
        raise UserError(
            f"the images that another process of this machine keeps in memory ({path}) cannot be opened ({error.strerror}). "
            "Run all processes as one user in one container, or turn in_memory off."
        ) from error
    return MemorySource(source, file)


def _fill(source: Source, request: Request, progress: bool) -> BinaryIO:
    """Fill the memory in two passes, first sizes, then bytes, so that nothing is stored twice. Unreadable files become empty."""

    def measure(chunk: range) -> list[int]:
        return [_or_if_broken(source.size, i, 0) for i in chunk]

    def fill(chunk: range) -> int:
        for i in chunk:
            data = _or_if_broken(partial(encoded, source), i, b"")
            if len(data) != offsets[i + 1] - offsets[i]:
                raise UserError(f"{source.name(i)} changed while it was read into memory.")
            content[offsets[i] : offsets[i + 1]] = data
        return len(chunk)

    chunks = [range(start, min(start + _CHUNK, len(source))) for start in range(0, len(source), _CHUNK)]
    with ThreadPoolExecutor(_THREADS) as threads:
        sizes = [size for chunk in threads.map(measure, chunks) for size in chunk]
        offsets = np.cumsum([0, *sizes], dtype=np.int64)
        head = offsets.tobytes()
        size = len(head) + int(offsets[-1])
        _check_memory(size, request)
        file = os.fdopen(os.memfd_create("images"), "r+b", buffering=0)
        file.truncate(size)
        with mmap.mmap(file.fileno(), size) as whole, memoryview(whole) as bytes_:
            bytes_[: len(head)] = head
            with bytes_[len(head) :] as content, _bar(source, request, progress) as bar:
                for count in threads.map(fill, chunks):
                    bar.update(count)
    return file


def _bar(source: Source, request: Request, progress: bool) -> tqdm:
    return tqdm(total=len(source), desc=request.split, unit=" images", disable=not progress)


def _or_if_broken(get: Callable[[int], T], i: int, otherwise: T) -> T:
    try:
        return get(i)
    except DECODE_ERRORS:
        return otherwise  # the loader finds an empty image there and reports it


def _check_memory(size: int, request: Request) -> None:
    available = {"this machine": psutil.virtual_memory().available, "this container": _left_in_container()}
    if size > min(available.values()):
        free = ", ".join(
            f"{amount / 2**30:.2f} GiB of {where}" for where, amount in available.items() if amount < np.inf
        )
        raise UserError(
            f"keeping {request.spec} in memory needs {size / 2**30:.2f} GiB, but only {free} are available. Turn in_memory off."
        )


def _left_in_container() -> float:
    """Return the bytes that the control group (cgroup v2) still allows; infinite without a limit."""
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return np.inf
    return np.inf if limit == "max" else int(limit) - int(used)
