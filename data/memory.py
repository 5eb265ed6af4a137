"""Encoded images of a source in shared memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
import psutil
import torch
from tqdm import tqdm

from data.decoding import DECODE_ERRORS
from data.source import Request, Source, encoded

_THREADS = 16
_CHUNK = 256  # images that a thread loads at a time

T = TypeVar("T")


class MemorySource(Source):
    """A source whose encoded images lie in shared memory: image i is `blob[offsets[i]:offsets[i + 1]]`, uint8."""

    def __init__(self, source: Source, blob: torch.Tensor, offsets: torch.Tensor) -> None:
        super().__init__(source.labels, source.class_names)
        self.num_classes, self.blob, self.offsets, self._source = source.num_classes, blob, offsets, source

    def image(self, i: int) -> bytes:
        start, end = self.offsets[i : i + 2].tolist()
        return self.blob[start:end].numpy().tobytes()

    def name(self, i: int) -> str:
        return self._source.name(i)

    def key(self, i: int) -> str:
        return self._source.key(i)


def load_into_memory(source: Source, request: Request, *, copies: int, progress: bool) -> MemorySource:
    """Two passes, first sizes, then bytes, so that nothing is held twice. Unreadable files become empty images."""

    def measure(chunk: range) -> list[int]:
        return [_or_if_broken(source.size, i, 0) for i in chunk]

    def fill(chunk: range) -> int:
        for i in chunk:
            data = _or_if_broken(partial(encoded, source), i, b"")
            if len(data) != offsets[i + 1] - offsets[i]:
                raise request.error(f"{source.name(i)} changed while it was read into memory.")
            array[offsets[i] : offsets[i + 1]] = np.frombuffer(data, np.uint8)
        return len(chunk)

    chunks = [range(start, min(start + _CHUNK, len(source))) for start in range(0, len(source), _CHUNK)]
    with ThreadPoolExecutor(_THREADS) as threads:
        sizes = [size for chunk in threads.map(measure, chunks) for size in chunk]
        offsets = np.cumsum([0, *sizes])
        _check_memory(int(offsets[-1]), request, copies)
        blob = torch.empty(int(offsets[-1]), dtype=torch.uint8).share_memory_()
        array = blob.numpy()
        with tqdm(total=len(source), desc=request.flag, unit=" images", disable=not progress) as bar:
            for count in threads.map(fill, chunks):
                bar.update(count)
    return MemorySource(source, blob, torch.from_numpy(offsets).share_memory_())


def _or_if_broken(get: Callable[[int], T], i: int, otherwise: T) -> T:
    try:
        return get(i)
    except DECODE_ERRORS:
        return otherwise  # the loader meets an empty image there, and names it


def _check_memory(size: int, request: Request, copies: int) -> None:
    available = {"memory": psutil.virtual_memory().available, "/dev/shm": shutil.disk_usage("/dev/shm").free}
    if size * copies > min(available.values()):
        free = ", ".join(f"{amount / 2**30:.2f} GiB of {where}" for where, amount in available.items())
        raise request.error(
            f"keeping {request.spec} in memory needs {size * copies / 2**30:.2f} GiB ({copies} × {size / 2**30:.2f}), "
            f"available are {free}. Use data.in_memory=0."
        )
