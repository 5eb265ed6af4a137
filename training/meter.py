"""Measurements of the steps of an epoch (losses, times, images that cannot be decoded), summed over all processes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from common.processes import Processes
from data.loader import Batch
from data.prefetch import prefetch
from training.console import warn
from training.progress import Progress

# Between two syncs, processes exchange only gradients and running statistics: to read a loss, the host must wait for the device.
SYNC_SECONDS = 1.0
MAX_PENDING = 50
# The first syncs include compilation, cuDNN's choice of algorithms and the loader's start.
WARMUP_SYNCS = 3
MEASURED_SECONDS = 20.0


@dataclass(frozen=True)
class Synced:
    """Measurements of all processes since the last sync.

    Attributes:
        steps: a record of each step: epoch, step, shape, lr, mean loss, and if present `skipped`, `attack`.
        loss: mean over the steps and processes.
        steps_per_second: of this process since the last sync.
        stop: whether a process was asked to stop.
    """

    steps: list[dict[str, Any]]
    loss: float
    steps_per_second: float
    stop: bool


class Meter:
    """Measures the steps of this process, and sums over all processes about once per second; `progress` gets the sums."""

    def __init__(self, processes: Processes, progress: Progress) -> None:
        self.processes, self.progress = processes, progress
        self._syncs, self._steady_steps, self._steady_seconds = 0, 0, 0.0
        self._speed_taken = False
        self._pending: list[tuple[dict[str, Any], Tensor]] = []
        self._gaps: deque[tuple[torch.Event, torch.Event]] = deque()  # the GPU waited for a batch
        self._bad: set[str] = set()  # images of this epoch that cannot be decoded
        self._waited, self._since, self._due, self._bad_synced = 0.0, 0.0, 1, 0

    def start_epoch(self) -> None:
        """Discard what remains of the previous epoch."""
        for of_epoch in (self._pending, self._gaps, self._bad):
            of_epoch.clear()
        self._waited, self._since, self._due, self._bad_synced = 0.0, time.perf_counter(), 1, 0

    def watch(self, batches: Iterator[Batch], *, accum: int) -> AbstractContextManager[Iterator[list[Batch]]]:
        """Return lists of `accum` batches on the device.

        The batches' generators are always closed afterwards; after an error they would keep the loader's workers alive.
        """
        there = prefetch(self._timed(batches), self.processes.device, lambda *gap: self._gaps.append(gap))
        return closing(self._groups(there, accum))

    def add(self, result: Tensor, **record: Any) -> None:
        """Add `result`, the return value of `train_step`, for the step described by `record`."""
        self._pending.append((record, result))

    @property
    def is_due(self) -> bool:
        """Whether a sync is due; the same on all processes."""
        return len(self._pending) >= self._due

    def sync(self, *, stop: bool) -> Synced:
        """Sum everything over all processes; all of them call this together. `stop`: this process was asked to stop."""
        progress, pending, self._pending = self.progress, self._pending, []
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        due = min(max(int(SYNC_SECONDS * len(pending) / max(seconds, 1e-9)), 1), MAX_PENDING)
        mine = [stop, due if self.processes.is_first else 0, len(self._bad) - self._bad_synced, self._take_waited()]
        self._bad_synced = len(self._bad)
        results = torch.stack([result for _, result in pending]).flatten()
        mine = torch.tensor(mine, dtype=results.dtype, device=results.device)
        *values, stops, due, bad, waited = self.processes.sum(torch.cat([results, mine])).tolist()
        self._due = int(due)
        self._syncs += 1
        if self._syncs > WARMUP_SYNCS:
            self._steady_steps += len(pending)
            self._steady_seconds += seconds
        progress.seconds += seconds
        progress.waiting += waited / self.processes.world_size
        progress.bad_images += int(bad)
        losses = [loss / self.processes.world_size for loss in values[::2]]
        steps = []
        for (record, _), loss, skipped in zip(pending, losses, values[1::2], strict=True):
            steps.append(record | {"loss": loss} | ({"skipped": True} if skipped else {}))
            if not skipped:
                progress.loss_sum += loss
                progress.loss_count += 1
        speed = len(pending) / max(seconds, 1e-9)
        return Synced(steps=steps, loss=sum(losses) / len(losses), steps_per_second=speed, stop=bool(stops))

    def take_speed(self) -> float | None:
        """Return the steps per second after the warm-up, once; None before it is known, and after it was returned."""
        if self._speed_taken or self._steady_seconds < MEASURED_SECONDS:
            return None
        self._speed_taken = True
        return self._steady_steps / self._steady_seconds

    def summary(self, *, images: int) -> dict[str, Any]:
        """Return the epoch's numbers, once its last step is synced; `images`: images of all its steps."""
        progress = self.progress
        seconds = max(progress.seconds, 1e-9)
        return {
            "train_loss": progress.loss_sum / max(progress.loss_count, 1),
            "seconds": round(progress.seconds, 3),
            "images_per_second": round(images / seconds, 2),
            "data_wait": round(progress.waiting / seconds, 4),
            "bad_images": progress.bad_images,
            "skipped_steps": progress.skipped,
        }

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        on_cpu = self.processes.device.type == "cpu"
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            # A GPU has queued work while the host waits, so there the gaps are counted instead.
            if on_cpu:
                self._waited += time.perf_counter() - begin
            if batch is None:
                return
            yield batch

    def _groups(self, batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
        while len(group := list(islice(batches, size))) == size:
            for name, reason in chain.from_iterable(batch.failures for batch in group):
                if name not in self._bad:
                    warn(f"{name} cannot be decoded ({reason}); the next image takes its place.")
                self._bad.add(name)
            yield group

    def _take_waited(self) -> float:
        """Return the seconds spent waiting for batches since the last call, as far as the GPU has finished."""
        while self._gaps and self._gaps[0][1].query():
            before, after = self._gaps.popleft()
            self._waited += before.elapsed_time(after) / 1000
        waited, self._waited = self._waited, 0.0
        return waited


class AttackLog:
    """Mean best loss and share of correctly classified images after each evaluation of the attack (`adv.verbose`).

    It covers the images of this process, one micro-batch after the other.
    """

    def __init__(self) -> None:
        self._rows: list[tuple[int, Tensor, Tensor]] = []

    def __call__(self, update: int, loss: Tensor, acc: Tensor) -> None:
        self._rows.append((update, loss.mean(), acc.float().mean()))

    def lines(self) -> list[dict[str, float]]:
        return [{"update": u, "loss": loss.item(), "acc": acc.item()} for u, loss, acc in self._rows]
