"""Everything that a GPU is to answer for this project, in one command.

    python -m benchmarks.gpu --minutes 8 --out DIR

Each part runs in a separate process with a time limit; the most wanted come first. A part that fails or runs out of time keeps
the figures that it has written, and the next one begins. DIR gets gpu.json, rewritten after each part, table.md, and the output
of each part. Without a GPU, each part runs as a small trial on the CPU or says why it cannot.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Row, copy_rate, main, matmul_rate, options, row, table, write
from benchmarks.loader import device_row
from common.files import writable, write_atomically
from common.processes import Processes
from common.provenance import PROJECT, provenance

SMALL, LARGE = ("vit_s", "convnext_tiny"), ("vit_b", "convnext_base")
LEAST_SECONDS = 10  # a part needs at least these


@dataclass(frozen=True)
class Part:
    """A program whose rows belong to the result, and the seconds that it may take."""

    name: str
    limit: int
    command: Sequence[str]


def plan(*, quick: bool, archs: Sequence[str]) -> list[Part]:
    """Return all parts, the most wanted first; `quick`: in small sizes."""
    small = ["--quick"] * quick

    def own(name: str, limit: int) -> Part:
        return Part(name, limit, ["-m", "benchmarks.gpu", "--part", name, *small])

    def steps(arch: str, limit: int) -> Part:
        return Part(f"step_{arch}", limit, ["-m", "benchmarks.train_step", "--arch", arch, *small])

    def largest(arch: str) -> Part:
        flags = ["--batch-size", "largest", "--arms", "eager"]
        return Part(f"largest_batch_{arch}", 60, ["-m", "benchmarks.train_step", "--arch", arch, *flags, *small])

    def tests(name: str, limit: int, *selected: str) -> Part:
        flags = ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
        return Part(name, limit, ["-m", "pytest", "-q", "-rs", *flags, "-m", *selected])

    return [
        own("rates", 30),
        tests("tests", 60, "gpu and not slow", "tests"),
        *(steps(arch, 190) for arch in archs if arch not in LARGE),
        *(steps(arch, 240) for arch in archs if arch in LARGE),
        *map(largest, archs),
        own("augmentation", 30),
        Part("autoattack", 240, ["-m", "benchmarks.autoattack", "--fast-copy", *small]),
        tests("resume", 120, "gpu", "tests/training/test_gpu.py", "-k", "resumed"),
        tests("two_ranks", 90, "gpu", "tests/training/test_gpu.py", "-k", "two_ranks"),
    ]


def run(part: Part, out: Path, seconds: float) -> dict[str, Any]:
    """Run a part for at most `seconds` and return its record: name, seconds, rows, and why rows are missing."""
    log, figures = out / f"{part.name}.log", out / f"{part.name}.json"
    figures.unlink(missing_ok=True)
    of_tests = "pytest" in part.command
    command = [sys.executable, *part.command, *([] if of_tests else ["--json", str(figures)])]
    begin, reason = time.monotonic(), ""
    with open(log, "wb") as file:
        child = subprocess.Popen(
            command,
            cwd=PROJECT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"GOMP_SPINCOUNT": "10000"},  # as in `harness.environment`
            start_new_session=True,
        )
        try:
            status = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status, reason = None, f"out of time after {seconds:.0f} s"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
    if of_tests and status in (0, 1):
        skipped = [line.split(": ", 1)[1] for line in lines if line.startswith("SKIPPED")]
        # Files that cannot be imported, for lack of a package that is not needed here, are errors in the last line.
        ran = " passed" in lines[-1] or " failed" in lines[-1]
        passed = [float(" failed" not in lines[-1])] if ran else None
        rows = [row(part.name, passed, "1: none failed", "== 1", note="; ".join([lines[-1].strip("= "), *skipped[:1]]))]
    else:
        rows = json.loads(figures.read_text())["rows"] if figures.exists() else []
        if status not in (0, 1, None) or (status == 1 and not rows):
            reason = f"exit status {status}: {lines[-1]}"
    return {"part": part.name, "seconds": round(time.monotonic() - begin, 1), "reason": reason, "rows": rows}


def summary(parts: Sequence[Mapping[str, Any]]) -> str:
    """Return one Markdown table of all figures; a part without figures has a line with its reason."""
    rows: list[Row] = []
    for part in parts:
        rows += part["rows"]
        if part["reason"] or not part["rows"]:
            rows.append(row(part["part"], None, "", note=part["reason"] or "no figures"))
    return table(rows)


def run_all(arguments: argparse.Namespace) -> int:
    """Run the parts until the time is up; return 0, whatever the parts say."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # also ends the part that runs
    out, end = arguments.out, time.monotonic() + 60 * arguments.minutes
    with writable("--out", out):
        out.mkdir(parents=True, exist_ok=True)
    quick = arguments.quick or not torch.cuda.is_available()
    measured_with, found = provenance(), []
    for part in plan(quick=quick, archs=arguments.archs.split(",")):
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            found.append({"part": part.name, "seconds": 0.0, "reason": "no time left", "rows": []})
        else:
            found.append(run(part, out, min(part.limit, left)))
        print(f"{part.name}: {found[-1]['seconds']} s {found[-1]['reason']}", file=sys.stderr, flush=True)
        write(out / "gpu.json", measured_with, minutes=arguments.minutes, trial=quick, parts=found)
    text = summary(found)
    write_atomically(out / "table.md", lambda file: file.write(text.encode()))
    print(text)
    return 0


# --- parts of this program -----------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> Iterator[list[Row]]:
    """Yield the rows of a part of this program."""
    device = Processes.alone().device
    if arguments.part == "augmentation":
        yield [device_row()]
        return
    yield [row("copy_rate", [copy_rate(device) / 1e9], "GB/s, read and written")]
    for precision in ("fp32", "tf32", "bf16", "fp16") if device.type == "cuda" else ("fp32",):
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        yield [row(f"matmul_rate_{precision}", [matmul_rate(device, precision) / 1e12], "TFLOP/s")]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = options(__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all parts")
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder of the results")
    parser.add_argument("--archs", default=",".join([*SMALL, *LARGE]), help="networks, comma-separated")
    parser.add_argument("--part", choices=("rates", "augmentation"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    given = parse(sys.argv[1:])
    sys.exit(main(measure, given) if given.part else run_all(given))
