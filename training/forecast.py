"""What a run will take, said once its speed is known."""

from __future__ import annotations

from datetime import datetime, timedelta

from training.config import TrainConfig
from training.schedule import resolution_at_epoch

WARMUP_LOOKS = 3  # compilation, cuDNN's choice of algorithms and the loader's start lie in the first ones
MEASURED_SECONDS = 20.0


class Forecast:
    """Measures training after its warm-up and forecasts the rest, once.

    Args:
        config: of the run.
        steps_per_epoch: optimiser steps.
        images_per_step: global batch.
        devices: what the run occupies, and what one is called: (8, "GPU").
    """

    def __init__(
        self, config: TrainConfig, *, steps_per_epoch: int, images_per_step: int, devices: tuple[int, str]
    ) -> None:
        self._epochs, self._resolution = config.training.epochs, config.resolution
        self._steps_per_epoch, self._images_per_step, self._devices = steps_per_epoch, images_per_step, devices
        self._looks, self._seconds, self._steps, self._work = 0, 0.0, 0, 0.0
        self._said = False

    def _work_of(self, epoch: int) -> float:
        """Of one step, in units that take equal time: nearly all of it is proportional to the number of pixels."""
        return float(resolution_at_epoch(epoch, resolution=self._resolution) ** 2)

    def add(self, *, step: int, steps: int, seconds: float) -> str | None:
        """Take in that the `steps` before optimiser step `step` took `seconds`; returns the forecast where it is due."""
        self._looks += 1
        if self._said or self._looks <= WARMUP_LOOKS:
            return None
        epoch = min((step - 1) // self._steps_per_epoch, self._epochs - 1)
        self._seconds, self._steps = self._seconds + seconds, self._steps + steps
        self._work += steps * self._work_of(epoch)
        if self._seconds < MEASURED_SECONDS:
            return None
        self._said = True
        return self._text(step, datetime.now())

    def seconds_left(self, step: int) -> float:
        """Training time after optimiser step `step`, without validation."""
        done, begun = step % self._steps_per_epoch, step // self._steps_per_epoch
        work = sum(self._steps_per_epoch * self._work_of(epoch) for epoch in range(begun, self._epochs))
        if begun < self._epochs:
            work -= done * self._work_of(begun)
        return work * self._seconds / self._work

    def _text(self, step: int, now: datetime) -> str:
        left = self.seconds_left(step)
        count, kind = self._devices
        rate = self._steps * self._images_per_step / self._seconds
        last = self._steps_per_epoch * self._work_of(self._epochs - 1) * self._seconds / self._work
        return (
            f"forecast: {rate:.4g} images/s, {_duration(last)} for the last epoch; {_duration(left)} left "
            f"({left / 3600 * count:.3g} {kind}-hours), until {now + timedelta(seconds=left):%Y-%m-%d %H:%M}, "
            "validation not counted"
        )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
