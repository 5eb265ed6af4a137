"""What every benchmark does alike: options, timed programs, rows of figures, and where they go."""

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

TAIL = 2000  # characters of a failed program's output that are shown
CHECKS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, "==": operator.eq}

Row = dict[str, Any]


def options(description: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a small run that shows that all works; few figures count")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
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
    """One figure: the median of several runs, with their spread.

    Args:
        name: of the row.
        figures: one a run; None where it could not be measured (`note` says why).
        unit: of the figure.
        target: such as "<= 1.05"; None where there is none.
        note: what a reader should know.
        counts: False where this run is too small to hold the figure against its target.
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
    """The rows in Markdown."""

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
    """Print the rows, write them to `path` if there is one; returns the exit status: 1 where a target is missed.

    `started`: when, and from which commit, the program was.
    """
    print(table(rows))
    if path is not None:
        measured_with = provenance() | started
        del measured_with["command"]  # names of folders that exist on one machine only
        content = {"device": ", ".join(measured_with.pop("devices")), **measured_with, "rows": list(rows)}
        with writable("--json", path):
            write_atomically(path, lambda file: file.write(json.dumps(content, indent=2).encode()))
    return int(any(r["ok"] is False for r in rows))


def main(measure: Callable[[argparse.Namespace], Sequence[Row]], arguments: argparse.Namespace) -> int:
    """Measure and publish; returns the exit status."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # end programs on the way out
    try:
        if arguments.json is not None:  # a folder that cannot be had shows now, not after the measurements
            with writable("--json", arguments.json.parent):
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
        started = {name: value for name, value in provenance().items() if name in ("started", "commit")}
        return publish(measure(arguments), arguments.json, started)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def environment() -> Mapping[str, str]:
    """The environment of measured programs: one thread a process, OpenMP's threads not spinning while they wait."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "10000"}


def run_program(arguments: Sequence[str], *, env: Mapping[str, str] | None = None) -> float:
    """Run a Python program in the project's root; returns its wall time in seconds.

    Raises:
        UserError: it failed, the end of its output is in the message; or it trained uncompiled where it was to be compiled.
    """
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=PROJECT, env=env, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if done.returncode != 0:
        raise UserError(
            f"{arguments[0]} ended with status {done.returncode}: {done.stderr[-TAIL:] or done.stdout[-TAIL:]}"
        )
    uncompiled = [line for line in done.stderr.splitlines() if "training runs uncompiled" in line]
    if uncompiled:
        raise UserError(f"{arguments[0]}: {uncompiled[0]}")
    return seconds


def train_on_digits(folder: Path, config: str, *flags: str) -> Path:
    """Train the network of configs/<config>.yaml with train.py; returns its run folder in `folder`."""
    argv = ["--config-file", str(PROJECT / "configs" / f"{config}.yaml"), f"--logging.folder={folder}", *flags]
    print(f"training a network ({config}) …", file=sys.stderr)
    run_program(["train.py", *argv])
    return folder / load_config(TrainConfig, argv).run_name
