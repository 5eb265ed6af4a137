"""Position of a run, apart from its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """Position of a run, apart from its weights; a training state stores both.

    Attributes:
        epochs_done: epochs that are trained, and saved, validated and logged if due.
        loss_sum, loss_count: over the steps of the current epoch, without skipped ones.
        seconds, waiting, bad_images, skipped: in the current epoch: training time, part of it waiting for images, undecodable
            images, skipped steps.
        bad_in_a_row: steps skipped since the last good one.
        best: network → {"epoch", "value"}: its best robust accuracy so far (clean accuracy in clean training).
        watch: {"best": `best` of the `OverfittingWatch`}, empty before the first.
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
        """Count the current epoch as done."""
        self.epochs_done += 1
        self.loss_sum, self.loss_count, self.bad_images, self.skipped = 0.0, 0, 0, 0
        self.seconds = self.waiting = 0.0
