"""Console output of a run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import tqdm

from training.curves import CURVES

# Numbers of an epoch on the console: the drawn ones, the speed and the use of the device. The log has all numbers.
SHOWN = [
    *(name for panel in CURVES.values() for name, _ in panel),
    *("images_per_second", "tflop_per_second", "mfu", "peak_memory_gib"),
]


def say(text: str) -> None:
    """Print a line; on a terminal it appears above the progress bar."""
    _write(text, sys.stdout)


def warn(text: str) -> None:
    """Print a warning to stderr; on a terminal it appears above the progress bar."""
    _write(f"warning: {text}", sys.stderr)


def _write(text: str, file: TextIO) -> None:
    if sys.stderr.isatty():
        tqdm.write(text, file=file)
    else:  # tqdm would redraw its bar
        print(text, file=file, flush=True)


def epoch_line(record: Mapping[str, Any], *, epochs: int) -> str:
    """Format the numbers of a validated epoch as one line."""
    numbers = "  ".join(f"{name} {record[name]:.4g}" for name in SHOWN if name in record)
    return f"epoch {record['epoch']}/{epochs}  {numbers}"


def progress_numbers(*, loss: float, lr: float, **efficiency: float) -> dict[str, str]:
    """Format the numbers beside the progress bar; `efficiency`: of `training.efficiency.Efficiency`."""
    numbers = {"loss": f"{loss:.3f}", "lr": f"{lr:.2g}"}
    if "mfu" in efficiency:
        numbers["MFU"] = f"{efficiency['mfu']:.0%}"
    if "peak_memory_gib" in efficiency:
        numbers["memory"] = f"{efficiency['peak_memory_gib']:.1f} GiB"
    return numbers


def progress_bar(*, epoch: int, epochs: int, images: int, done: int, shown: bool) -> tqdm:
    """Return the progress bar of epoch `epoch` (from 1 on), with speed and remaining time; in a file at most a line per minute."""
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
