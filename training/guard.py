"""Checks that end a run or warn: steps without a finite loss, images that cannot be decoded, lost robustness."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import Any

from common.errors import UserError
from common.processes import Processes
from training.config import TrainConfig
from training.console import warn
from training.meter import Synced
from training.overfitting import OverfittingWatch
from training.progress import Progress

MASKED = 0.1  # a larger share of images with zero gradient gives a warning
# After this number of epochs, a network that learns is more than three standard errors above chance.
CHANCE_EPOCHS, NEAR_CHANCE = 3, 0.1


class Diverged(Exception):
    """Training cannot recover; the entry script exits with status 3."""


class Guard:
    """Counts failures, and ends the run if there are too many."""

    def __init__(self, config: TrainConfig, processes: Processes, progress: Progress) -> None:
        self.config, self.processes, self.progress = config, processes, progress
        self._bad_losses: deque[tuple[int, float]] = deque(maxlen=5)  # steps skipped since the last good one

    def check(self, synced: Synced) -> None:
        """Process the steps of a sync, and end the run if too many failed.

        Raises:
            Diverged: too many steps in a row were skipped.
            UserError: too many images of the epoch cannot be decoded.
        """
        progress = self.progress
        for record in synced.steps:
            if "skipped" not in record:
                progress.bad_in_a_row = 0
                self._bad_losses.clear()
                continue
            # A float16 gradient that overflows is normal: the scaler lowers its scale. It gives no warning.
            if not math.isfinite(record["loss"]) and not progress.bad_in_a_row and self.processes.is_first:
                warn(f"the loss is {record['loss']} at step {record['step']}; the step is skipped.")
            progress.skipped += 1
            progress.bad_in_a_row += 1
            self._bad_losses.append((record["step"], record["loss"]))
        if progress.bad_in_a_row >= self.config.training.max_bad_steps:
            numbers = ", ".join(f"{loss:.4g} at step {step}" for step, loss in self._bad_losses)
            raise Diverged(
                f"{progress.bad_in_a_row} steps in a row were skipped, because loss or gradient were not finite (loss {numbers}); "
                "check lr.lr, adv.eps and training.precision; training states and weights saved before are unchanged"
            )
        if progress.bad_images > (limit := self.config.data.max_bad_images):
            raise UserError(
                f"data.max_bad_images: {progress.bad_images} images of data.train_dataset could not be decoded in one epoch, "
                f"{limit} are allowed; the warnings above list them. Repair the data set or raise the limit."
            )

    def suspicions(self, metrics: dict[str, Any], *, images: int) -> Iterator[str]:
        """Yield a sentence for each result of an epoch's validation (on `images` images) that is misleading."""
        masked = max(metrics.get(f"{prefix}zero_gradients", 0.0) for prefix in ("", "ema_"))
        if masked > MASKED:
            yield (
                f"the gradient is zero for {masked:.0%} of the images under attack, as with logits so large that the softmax "
                "saturates. Gradient-based attacks, including the attack used in training, cannot change these images."
            )
        chance, epochs = 1 / self.config.model.num_classes, metrics["epoch"]
        error = 3 * math.sqrt(chance * (1 - chance) / images)
        # Few images cannot distinguish a network that starts to learn from chance.
        if epochs >= CHANCE_EPOCHS and metrics["top1"] < chance + error <= max(2 * chance, NEAR_CHANCE):
            yield (
                f"clean accuracy is {metrics['top1']:.2%} after {epochs} epochs, no better than chance ({chance:.2%}) on {images} "
                "images. If more epochs do not help, check lr.lr for this global batch, its warm-up (lr.lr_peak_epoch, "
                "adv.eps_warmup_epochs), the labels, and the start weights (model.pretrained, model.ckpt_path)."
            )

    def overfitting(self, metrics: dict[str, Any], *, epoch: int, images: int) -> str | None:
        """Return a warning if the network lost its robustness to the stronger attack but not to the training attack.

        `metrics`: validation of an epoch, with the accuracies under both attacks on `images` images.
        """
        watch = OverfittingWatch(chance=1 / self.config.model.num_classes, best=self.progress.watch.get("best"))
        weak, strong = metrics["train_attack_top1"], metrics["adv_top1"]
        found = watch.update(epoch=epoch, strong=strong, weak=weak, n=images)
        self.progress.watch = {"best": watch.best}
        return found
