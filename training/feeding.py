"""Whether images come fast enough: the loader's own speed, and how long training waits for it."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Iterator
from itertools import islice

import torch

from data.loader import Batch

MEASURE_SECONDS = 10.0  # at start-up, at most, if that shows anything
NOTICED_SHARE = 0.05  # of the time
NOTICED_SECONDS = 30.0  # of training


class Feed:
    """Watches the batches of one process.

    A CPU waits where this process does. A GPU has work queued while the host waits for a batch: what counts is how long it has
    none, between the events of `on_gap`.

    Attributes:
        rate: images/s of this process's loader while nothing else is done; None until it has been measured, and where there are
            too few batches to measure it.
    """

    def __init__(self, *, num_workers: int, device: torch.device) -> None:
        self.rate: float | None = None
        self._num_workers, self._device, self._measured, self._waited = num_workers, device, False, 0.0
        self._gaps: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the first time, some are loaded ahead to measure the loader alone.

        That is done before this returns: whoever iterates waits for none of them.
        """
        ahead = deque() if self._measured else self._load_ahead(batches)
        return self._watched(ahead, batches)

    def _watched(self, ahead: deque[Batch], batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            begin = time.perf_counter()
            batch = ahead.popleft() if ahead else next(batches, None)
            if self._device.type == "cpu":
                self._waited += time.perf_counter() - begin
            if batch is None:
                return
            yield batch

    def _load_ahead(self, batches: Iterator[Batch]) -> deque[Batch]:
        """The first batches, three from each worker: the first ones are there all at once, after the workers' start; the others
        come at the workers' speed."""
        self._measured = True
        first = max(self._num_workers, 1)
        ahead, begin, since = deque(), time.perf_counter(), 0.0
        for batch in batches:
            ahead.append(batch)
            now = time.perf_counter()
            if len(ahead) == first:
                since = now
            late = now - begin > MEASURE_SECONDS and len(ahead) > first
            if len(ahead) == 3 * first or late:
                break
        if len(ahead) > first:
            self.rate = sum(len(batch.y) for batch in islice(ahead, first, None)) / max(now - since, 1e-9)
        return ahead

    def on_gap(self, before: torch.cuda.Event, after: torch.cuda.Event) -> None:
        """The GPU waits for a batch from `before` to `after`; as `data.prefetch.prefetch` tells."""
        self._gaps.append((before, after))

    def take(self) -> float:
        """Seconds waited for batches since the last call, as far as the GPU has come."""
        while self._gaps and self._gaps[0][1].query():
            before, after = self._gaps.popleft()
            self._waited += before.elapsed_time(after) / 1000
        waited, self._waited = self._waited, 0.0
        return waited

    def advice(self, *, images_per_second: float, waiting: float, processes: int) -> str | None:
        """What to do where training waits too long; None where it does not.

        Args:
            images_per_second: what each process trained.
            waiting: share of the time that it waited, in [0, 1].
            processes: of this machine.
        """
        if waiting < NOTICED_SHARE or self.rate is None:
            return None
        wanted = images_per_second / max(1 - waiting, 1e-3)  # without waiting
        workers = math.ceil(1.1 * wanted * max(self._num_workers, 1) / self.rate)
        cores = len(os.sched_getaffinity(0)) // processes
        text = (
            f"training waits for images {waiting:.0%} of the time: the loader alone gave {self.rate:.0f} images/s in each process "
            f"with data.num_workers={self._num_workers}, training without waiting would take {wanted:.0f}; "
            f"data.num_workers={workers} would suffice"
        )
        if workers > cores:
            text += (
                f", but there are {cores} cores for each process: smaller stored images (python -m data.prepare --short-side) and "
                "data.in_memory=1 help as well"
            )
        return text + "."
