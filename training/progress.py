"""Where a run is, apart from its weights, and what its steps have said so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Progress:
    """Where a run is, apart from its weights: what a training state keeps beside them.

    Attributes:
        epochs_done: epochs trained, saved, validated and logged.
        loss_sum, loss_count: of the present epoch's steps, without skipped ones.
        seconds, waiting, bad_images, skipped: of the present epoch: training time, time of it waiting for images, undecodable
            images met, steps skipped.
        bad_in_a_row: steps skipped since the last good one.
        best: network → {"epoch", "value"}: its best robust (clean training: clean) accuracy so far.
        watch: state of the `OverfittingWatch`.
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


class StepLog:
    """Records of steps whose results are still on the device.

    Attributes:
        until: number of steps to collect before the processes look at them.
    """

    def __init__(self, *, epoch: int, shape: list[int]) -> None:
        self.epoch, self.shape, self.until = epoch, shape, 1
        self._pending: list[tuple[dict[str, Any], torch.Tensor]] = []

    def add(self, result: torch.Tensor, *, step: int, lr: float, attack: AttackLog | None) -> None:
        """`result`: what `train_step` returned for optimiser step `step`, counted from 1."""
        record = {"epoch": self.epoch, "step": step, "shape": self.shape, "lr": lr}
        if attack is not None:
            record["attack"] = attack.lines()
        self._pending.append((record, result))

    @property
    def is_due(self) -> bool:
        return len(self._pending) >= self.until

    def take(self) -> list[tuple[dict[str, Any], torch.Tensor]]:
        """Records and results since the last call."""
        pending, self._pending = self._pending, []
        return pending


class AttackLog:
    """Mean best loss and share of samples still correct after each evaluation of one attack (`adv.verbose`)."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def __call__(self, update: int, loss: torch.Tensor, acc: torch.Tensor) -> None:
        self._rows.append((update, loss.mean(), acc.float().mean()))

    def lines(self) -> list[dict[str, float]]:
        return [{"update": u, "loss": loss.item(), "acc": acc.item()} for u, loss, acc in self._rows]
