"""Where a run is, apart from its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """Where a run is, apart from its weights: what a training state keeps beside them.

    Attributes:
        epochs_done: epochs trained, and saved, validated and logged where that was due.
        loss_sum, loss_count: of the present epoch's steps, without skipped ones.
        seconds, waiting, bad_images, skipped: of the present epoch: training time, time of it waiting for images, undecodable
            images met, steps skipped.
        bad_in_a_row: steps skipped since the last good one.
        best: network → {"epoch", "value"}: its best robust (clean training: clean) accuracy so far.
        watch: {"best": that of the `OverfittingWatch`}, once there was one.
    """

    epochs_done: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    bad_images: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    best: dict[str, dict[str, float]] = field(default_factory=dict)
    watch: dict[str, Any] = field(default_factory=dict)

    def finish_epoch(self) -> None:
        """Count the present epoch as done."""
        self.epochs_done += 1
        self.loss_sum, self.loss_count, self.bad_images, self.skipped = 0.0, 0, 0, 0
        self.seconds = self.waiting = 0.0
