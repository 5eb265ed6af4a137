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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import writable, write_atomically
from common.flags import load_config
from common.provenance import PROJECT, provenance
from common.tables import markdown_table
from training.config import TrainConfig

TAIL = 2000  # characters of a failed program's output to show
CHECKS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, "==": operator.eq}

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


def publish(rows: Sequence[Row], path: Path | None, started: Mapping[str, str]) -> int:
    """Print the rows and write them to `path`, if given; return the exit status: 1 if a target is missed.

    `started`: start time and commit of the program.
    """
    print(table(rows))
    if path is not None:
        measured_with = provenance() | started
        del measured_with["command"]  # contains folders of this machine
        content = {"device": ", ".join(measured_with.pop("devices")), **measured_with, "rows": list(rows)}
        with writable("--json", path):
            write_atomically(path, lambda file: file.write(json.dumps(content, indent=2).encode()))
    return int(any(r["ok"] is False for r in rows))


def main(measure: Callable[[argparse.Namespace], Sequence[Row]], arguments: argparse.Namespace) -> int:
    """Measure and publish; return the exit status."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # also ends child programs
    try:
        if arguments.json is not None:  # report an unusable folder before the measurements
            with writable("--json", arguments.json.parent):
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
        started = {name: value for name, value in provenance().items() if name in ("started", "commit")}
        return publish(measure(arguments), arguments.json, started)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


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
