"""What a run says on the console."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import tqdm

from common.processes import Processes
from training.config import TrainConfig
from training.curves import CURVES
from training.schedule import resolution_at_epoch

# Numbers of an epoch that the console shows: those that are drawn, and the speed. The log holds all.
SHOWN = [*(name for panel in CURVES.values() for name, _ in panel), "images_per_second"]


def say(text: str) -> None:
    """Print a line, on a terminal above the progress bar."""
    _write(text, sys.stdout)


def warn(text: str) -> None:
    """Print a warning to stderr, on a terminal above the progress bar."""
    _write(f"warning: {text}", sys.stderr)


def _write(text: str, file: TextIO) -> None:
    if sys.stderr.isatty():
        tqdm.write(text, file=file)
    else:  # tqdm would draw its bar anew
        print(text, file=file, flush=True)


def headline(
    config: TrainConfig, processes: Processes, *, name: str, steps_per_epoch: int, images_per_step: int, aside: str
) -> str:
    """What the run is; `aside`: where it begins."""
    adv, model = config.adv, config.model
    attack = "clean" if adv.attack == "none" else f"{adv.attack} {adv.norm} eps {adv.eps:.4g}"
    return (
        f"{name}: {model.arch}{' with ConvStem' if model.not_original else ''}, {attack}, {steps_per_epoch} steps an epoch of "
        f"{images_per_step} images on {processes.world_size} × {processes.device.type}{aside}"
    )


def epoch_line(record: Mapping[str, Any], *, epochs: int) -> str:
    """The numbers of a validated epoch."""
    numbers = "  ".join(f"{name} {record[name]:.4g}" for name in SHOWN if name in record)
    return f"epoch {record['epoch']}/{epochs}  {numbers}"


def progress_bar(*, epoch: int, epochs: int, images: int, done: int, shown: bool) -> tqdm:
    """Of the images of epoch `epoch` (from 1 on), with the rate and the remaining time; in a file one line a minute at most."""
    tqdm.monitor_interval = 0  # no thread that refreshes bars
    terminal = sys.stderr.isatty()
    return tqdm(
        total=images,
        initial=done,
        desc=f"epoch {epoch}/{epochs}",
        unit="img",
        disable=not shown,
        mininterval=0.5 if terminal else 60.0,
        delay=0.0 if terminal else 60.0,
        dynamic_ncols=True,
        leave=False,
    )


def forecast(
    config: TrainConfig,
    processes: Processes,
    *,
    speed: float,
    epochs_done: int,
    step: int,
    steps_per_epoch: int,
    images_per_step: int,
) -> str:
    """What is left after optimiser step `step`, at `speed` steps a second; a step takes time by its images' pixels."""
    epochs = range(epochs_done, config.training.epochs)
    pixels = [resolution_at_epoch(epoch, resolution=config.resolution) ** 2 for epoch in epochs]
    of_epoch = step - epochs_done * steps_per_epoch
    hours = (sum(pixels) / pixels[0] * steps_per_epoch - of_epoch) / speed / 3600
    kind = "GPU" if processes.device.type == "cuda" else "process"
    return (
        f"{speed * images_per_step:.4g} images/s: {hours:.3g} h left, {hours * processes.world_size:.3g} {kind}-hours, without "
        "validation"
    )
