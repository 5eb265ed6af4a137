"""What saving a training state costs the training, and how soon a run goes on from one.

    python -m benchmarks.state [--repeats 5] [--folder DIR] [--quick] [--json FILE]

The first: a network of 90 million parameters with AdamW and EMA takes steps, in turns without and with one state saved in the
middle, on a GPU if there is one. The second: the demo on the CPU, killed and started again. Linux only.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.harness import Row, main, options, row
from benchmarks.killing import POLL_SECONDS, Run
from common.config import LoggingConfig, TrainConfig, load_config
from common.errors import UserError
from common.files import writable
from common.processes import Processes
from common.provenance import PROJECT
from data.loader import Batch
from training.build import build_state
from training.checkpoint import LAST, StateFiles
from training.state import TrainState
from training.step import train_step

IMAGE_SIZE, BATCH_SIZE = 64, 4
LARGE, SMALL = "convnext_base", "convnext_micro"
TOO_SMALL = "--quick: a small network"
DEMO = ("--config-file", str(PROJECT / "configs" / "demo_robust.yaml"), "--logging.ckpt_steps=1")


@dataclass(frozen=True)
class Saving:
    """What one saved state took, in seconds.

    Attributes:
        extra: that the steps took longer with it than without.
        foreground: for which the training stood still.
        background: from there until the state was on disk, while the training went on.
    """

    extra: float
    foreground: float
    background: float


@dataclass(frozen=True)
class Savings:
    """The states saved one after the other, and what they were saved from: parameters, size of a file in bytes, steps timed."""

    each: list[Saving]
    parameters: int
    size: int
    steps: int
    step_seconds: float


def time_saving(arch: str, folder: Path, *, repeats: int) -> Savings:
    """Train `arch` on noise; returns what each of `repeats` states saved to `folder` cost.

    Raises:
        UserError: a state could not be written.
    """
    state, step = build_training(arch)
    files = StateFiles(folder)
    _time_steps(state, step, 2)  # the optimiser's own state comes with the first step
    step_seconds = _time_steps(state, step, 2) / 2
    first = _save_alone(state, files)
    # The write has to come to its end while steps are taken, though they slow it down.
    steps = 2 * max(2, math.ceil(2 * first / step_seconds))
    each = []
    for _ in range(repeats):
        without = _time_steps(state, step, steps)
        foreground: list[float] = []
        extra = _time_steps(state, step, steps, files, foreground) - without
        each.append(Saving(extra, foreground[0], _written(files)))
    parameters = sum(p.numel() for p in state.model.parameters())
    return Savings(each, parameters, (folder / LAST).stat().st_size, steps, step_seconds)


def build_training(arch: str) -> tuple[TrainState, Callable[[], torch.Tensor]]:
    """The state of a new training, and a function that takes one step of it and returns the loss."""
    argv = [
        f"--model.arch={arch}",
        "--model.not_original=1",
        "--model.pretrained=0",
        "--model.model_ema=1",
        f"--resolution.min_res={IMAGE_SIZE}",
        f"--resolution.max_res={IMAGE_SIZE}",
        *("--data.train_dataset=none", "--data.val_dataset=none", "--data.num_workers=0", "--data.in_memory=0"),
        f"--training.batch_size={BATCH_SIZE}",
        "--training.precision=fp32",
    ]
    config, processes = load_config(TrainConfig, argv), Processes.alone()
    state = build_state(config, processes)
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        x=torch.rand(BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
        y=torch.arange(BATCH_SIZE),
        index=torch.arange(BATCH_SIZE),
        failures=[],
    )

    def step() -> torch.Tensor:
        return train_step(state, [batch], config=config, processes=processes, mixup=None, lr=1e-5, eps=config.adv.eps)

    return state, step


def _time_steps(
    state: TrainState,
    step: Callable[[], torch.Tensor],
    steps: int,
    files: StateFiles | None = None,
    foreground: list[float] | None = None,
) -> float:
    """Seconds of so many steps, with a state saved in the middle where `files` are given, until it is written."""
    begin = time.perf_counter()
    for number in range(steps):
        if files is not None and number == steps // 2:
            before = time.perf_counter()
            files.save(state.state_dict())
            foreground.append(time.perf_counter() - before)
        loss = step()
    loss.cpu()  # waits for a GPU
    if files is not None:
        files.wait()
    return time.perf_counter() - begin


def _save_alone(state: TrainState, files: StateFiles) -> float:
    begin = time.perf_counter()
    files.save(state.state_dict())
    files.wait()
    _written(files)
    return time.perf_counter() - begin


def _written(files: StateFiles) -> float:
    """Seconds that the only write since the last call took."""
    (outcome,) = files.outcomes()
    if outcome.error is not None:
        raise UserError(f"--folder: a training state cannot be written to {files.folder}: {outcome.error}.")
    return outcome.seconds


def time_restarts(folder: Path, *, repeats: int, flags: Sequence[str] = DEMO) -> list[float]:
    """Seconds from each of `repeats` starts until a killed run has taken its first step and saved it.

    Args:
        folder: for the run folder.
        flags: of train.py; with logging.ckpt_steps=1, and work that outlasts the restarts.

    Raises:
        UserError: a run ended by itself.
    """
    argv = [*flags, f"--logging.folder={folder}"]
    last = folder / load_config(TrainConfig, argv).run_name / LAST
    _, *restarts = [_time_to_next_state(argv, last) for _ in range(repeats + 1)]
    return restarts


def _time_to_next_state(argv: Sequence[str], last: Path) -> float:
    """Seconds from a start until there is a new file `last`; the run is killed then."""
    known, begin = _identity(last), time.perf_counter()
    with Run(["train.py", *argv]) as run:
        while _identity(last) in (None, known):
            if run.ends_before(POLL_SECONDS):
                run.check()
                raise UserError(f"train.py ended before there was a new {last}.")
        return time.perf_counter() - begin


def _identity(path: Path) -> tuple[int, int] | None:
    """Another one for every file that has had this name; None between two of them."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def state_rows(savings: Savings, restarts: Sequence[float], *, minutes: float, counts: bool) -> list[Row]:
    """The figures; `minutes` between two states; `counts`: as of `benchmarks.harness.row`."""
    small = "" if counts else TOO_SMALL
    extra = [saving.extra for saving in savings.each]
    what = f"{savings.parameters / 1e6:.1f} M parameters, AdamW, EMA"
    steps = f"of {savings.steps} steps of {savings.step_seconds:.2f} s, half of them after the state"
    share = f"one state in {minutes:g} minutes of training" + (f"; {small}" if small else "")
    return [
        row("state_share", [e / (60 * minutes) for e in extra], "of time", "< 0.01", counts=counts, note=share),
        row("extra_seconds", extra, "s", note=steps),
        row(
            "foreground_seconds", [saving.foreground for saving in savings.each], "s", note="the training stands still"
        ),
        row("background_seconds", [saving.background for saving in savings.each], "s", note="the training goes on"),
        row("state_mb", [savings.size / 1e6], "MB", note=what),
        row(
            "restart_seconds", restarts, "s", "< 30", note="the demo on the CPU, until its first step is done and saved"
        ),
    ]


def measure(arguments: argparse.Namespace) -> list[Row]:
    """All rows."""
    repeats = arguments.repeats or (1 if arguments.quick else 5)
    minutes = LoggingConfig().ckpt_minutes
    if arguments.folder is not None:
        with writable("--folder", arguments.folder):
            arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="state", dir=arguments.folder) as folder:
        (states := Path(folder) / "states").mkdir()
        savings = time_saving(SMALL if arguments.quick else LARGE, states, repeats=repeats)
        restarts = time_restarts(Path(folder) / "runs", repeats=repeats)
    return state_rows(savings, restarts, minutes=minutes, counts=not arguments.quick)


if __name__ == "__main__":
    parser = options(__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, help="states, and restarts (default 5; 1 with --quick)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: that of temporary files")
    sys.exit(main(measure, parser.parse_args()))
