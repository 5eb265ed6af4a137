"""Common parts of all benchmarks: options, timed programs, rows of figures and their output."""

from __future__ import annotations

import argparse
import json
import operator
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.files import writable, write_atomically
from common.flags import load_config
from common.provenance import PROJECT, provenance
from common.tables import markdown_table
from training.config import TrainConfig

TAIL = 2000  # characters of a failed program's output to show
CHECKS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, "==": operator.eq}

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

Row = dict[str, Any]


def options(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of all benchmarks."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a small test run; most targets are not checked")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    return parser


def row(
    name: str,
    figures: Sequence[float] | None,
    unit: str,
    target: str | None = None,
    *,
    note: str = "",
    counts: bool = True,
) -> Row:
    """Return a row with one figure: the median of several runs, with their spread.

    Args:
        name: name of the row.
        figures: one value per run; None if it could not be measured (`note` says why).
        unit: unit of the figure.
        target: condition such as "<= 1.05"; None for no target.
        note: remark for the reader.
        counts: False if this run is too small to check the figure against its target.
    """
    figure = None if figures is None else statistics.median(figures)
    ok = None
    if target is not None and figure is not None and counts:
        sign, limit = target.split()
        ok = bool(CHECKS[sign](figure, float(limit)))
    spread = [min(figures), max(figures)] if figures is not None and len(figures) > 1 else None
    return {
        "name": name,
        "figure": figure,
        "unit": unit,
        "target": target if counts else None,
        "ok": ok,
        "spread": spread,
        "note": note,
    }


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    return markdown_table(
        [
            {
                "name": r["name"],
                "figure": "not measured" if r["figure"] is None else number(r["figure"]),
                "spread": " – ".join(map(number, r["spread"] or [])),
                "unit": r["unit"],
                "target": r["target"] or "",
                "ok": {None: "", True: "yes", False: "no"}[r["ok"]],
                "note": r["note"],
            }
            for r in rows
        ]
    )


def write(path: Path, measured_with: Mapping[str, Any], **content: Any) -> None:
    """Write figures with what they were measured with (`provenance()` of the start) as JSON."""
    facts = {name: value for name, value in measured_with.items() if name != "command"}  # has folders of this machine
    facts = {"device": ", ".join(facts.pop("devices")), **facts, **content}
    with writable("--json", path):
        write_atomically(path, lambda file: file.write(json.dumps(facts, indent=2).encode()))


def main(measure: Callable[[argparse.Namespace], Iterable[Sequence[Row]]], arguments: argparse.Namespace) -> int:
    """Measure, print all rows, and write them to `--json` as they come; return the exit status: 1 if a target is missed."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # also ends child programs
    rows: list[Row] = []
    try:
        if arguments.json is not None:  # report an unusable folder before the measurements
            with writable("--json", arguments.json.parent):
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
        measured_with = provenance()
        for some in measure(arguments):
            rows += some
            if arguments.json is not None:
                write(arguments.json, measured_with, rows=rows)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    return int(any(r["ok"] is False for r in rows))


@dataclass(frozen=True)
class Sample:
    """Wall seconds and CPU seconds of an action in this process."""

    wall: float
    cpu: float


def timed(action: Callable[[], object], device: torch.device, *, times: int = 1) -> Sample:
    """Return the seconds per `action`, averaged over `times` consecutive calls; the device has then finished all work."""
    wait = torch.get_device_module(device).synchronize if device.type != "cpu" else lambda: None
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        action()
    wait()
    return Sample((time.perf_counter() - wall) / times, (time.process_time() - cpu) / times)


def matmul_rate(device: torch.device, precision: str) -> float:
    """Return the FLOP/s of the fastest of five square matrix products, in the precision of a step."""
    size, dtype = (2048 if device.type == "cpu" else 8192), DTYPES.get(precision, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * size**3 / min(timed(lambda: a @ b, device).wall for _ in range(5))


def copy_rate(device: torch.device) -> float:
    """Return the bytes per second, read and written, of the fastest of five large copies on the device."""
    source = torch.randn((64 if device.type == "cpu" else 1024) * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source), device).wall for _ in range(5))


def environment() -> Mapping[str, str]:
    """Return the environment of measured programs: one thread per process; OpenMP's threads do not spin while they wait."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "10000"}


def run_program(arguments: Sequence[str], *, env: Mapping[str, str] | None = None) -> float:
    """Run a Python program in the project's root and return its wall time in seconds.

    Raises:
        UserError: the program failed (the message has the end of its output), or it fell back to uncompiled training.
    """
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=PROJECT, env=env, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if done.returncode != 0:
        raise UserError(
            f"{arguments[0]} failed with exit status {done.returncode}: {done.stderr[-TAIL:] or done.stdout[-TAIL:]}"
        )
    uncompiled = [line for line in done.stderr.splitlines() if "training runs uncompiled" in line]
    if uncompiled:
        raise UserError(f"{arguments[0]}: {uncompiled[0]}")
    return seconds


def train_on_digits(folder: Path, config: str, *flags: str) -> Path:
    """Train the network of configs/<config>.yaml with train.py and return its run folder in `folder`."""
    argv = ["--config-file", str(PROJECT / "configs" / f"{config}.yaml"), f"--logging.folder={folder}", *flags]
    print(f"training a network ({config}) …", file=sys.stderr)
    run_program(["train.py", *argv])
    return folder / load_config(TrainConfig, argv).run_name
