"""Run a grid of trainings (flags × seeds), evaluate the networks and summarise the results.

    bash run_ablation.sh GRID.yaml [--jobs N] [--threads N] [--out DIR] [--seeds 0,1] [--arms a,b] [--section.flag=value …]
    bash run_ablation.sh GRID.yaml --summary        only summarise the existing results
    bash run_ablation.sh GRID.yaml --check          check the grid and list its runs

The grid is a YAML file (see ablation/grid.py). Further flags of train.py apply to all runs. Finished runs are skipped,
interrupted ones resume. The grid's folder gets summary.md, summary.csv, summary.json and summary.png, and a folder for each
arm and seed with its run, its evaluations and their output. With a claims file: also evidence.md and evidence.json.

Exit status: 0 all runs are finished; 1 some failed (the summary lists them); 2 wrong input; 75 stopped (a file
`stop` in a run's folder, or the end of a Slurm job); 130, 143 interrupted or terminated. The same command resumes.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ablation.evidence import read_claims, write_evidence
from ablation.grid import Cell, Grid, load_grid
from ablation.running import Place, Runner, stopping_on_signals
from ablation.summary import summarise
from common.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Run one command line (without the program's name) and return the exit status."""
    try:
        arguments, extra = parse(argv)
        grid = load_grid(arguments.grid, out=arguments.out, seeds=arguments.seeds, extra=extra)
        if grid.claims:
            read_claims(grid.claims, grid)  # reports errors before hours of training
        cells = grid.cells_of(arguments.arms)
        if arguments.check:
            print("\n".join(f"{cell}: train.py {' '.join(cell.train_argv())}" for cell in cells))
            return 0
        status = 0 if arguments.summary else run(grid, cells, arguments)
        summary = summarise(grid)
        print(summary.markdown(), end="")
        if grid.claims:
            write_evidence(summary, grid.claims, arguments.evidence or grid.out)
        print(f"summary.md, summary.csv, summary.json, summary.png: {grid.out}", file=sys.stderr)
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(grid: Grid, cells: list[Cell], arguments: argparse.Namespace) -> int:
    """Train and evaluate `cells` and return the exit status."""
    runner = Runner(cells, make_slots(arguments.jobs, arguments.threads), on_change=lambda: summarise(grid))
    with stopping_on_signals(runner) as received:
        status = runner.run()
    return 128 + received[0] if received else status


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="run_ablation.sh", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("grid", type=Path, metavar="GRID.yaml")
    parser.add_argument(
        "--jobs",
        type=_count,
        metavar="N",
        help="parallel runs, spread over the visible GPUs (default: one per GPU; without GPUs: one)",
    )
    parser.add_argument(
        "--threads", type=_count, metavar="N", help="CPU threads per run (default: an equal share of the cores)"
    )
    parser.add_argument("--out", type=Path, help="output folder (default: runs/ablations/<name of the file>)")
    parser.add_argument("--seeds", type=_seeds, default=[], help="comma-separated seeds that replace those of the grid")
    parser.add_argument(
        "--arms",
        type=lambda text: text.split(","),
        default=[],
        metavar="A,B",
        help="train only these arms and the arms that they start from",
    )
    parser.add_argument(
        "--evidence", type=Path, metavar="DIR", help="folder for evidence.md and evidence.json (default: --out)"
    )
    parser.add_argument("--check", action="store_true", help="check the grid and list its runs, then exit")
    parser.add_argument("--summary", action="store_true", help="only summarise the existing results")
    arguments, extra = parser.parse_known_args(argv)
    if wrong := [flag for flag in extra if not re.match(r"--\w+\.\w+=", flag)]:
        raise UserError(f"command line: expected further flags as --section.name=value, got {wrong[0]!r}.")
    return arguments, extra


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers separated by commas, got {text!r}") from None


def make_slots(jobs: int | None, threads: int | None) -> list[Place]:
    """Return one slot per parallel run, assigned to the visible GPUs in rotation."""
    from common.gpus import usable_gpus  # imports PyTorch, which takes seconds

    usable = usable_gpus()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(usable)))
    gpus = [name.strip() for name in visible.split(",")]
    if not usable or not gpus[0].startswith("MIG-"):  # a process sees only the first MIG instance
        gpus = gpus[:usable]  # CUDA ignores the list from the first missing GPU on
    jobs = jobs or max(1, len(gpus))
    threads = threads or max(1, len(os.sched_getaffinity(0)) // jobs)
    return [Place(gpus[number % len(gpus)] if gpus else "", threads) for number in range(jobs)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
