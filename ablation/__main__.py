"""Run a grid of trainings, evaluate it, and summarise it.

    bash run_ablation.sh GRID.yaml [--jobs N] [--threads N] [--out DIR] [--seeds 0,1] [--section.flag=value …]
    bash run_ablation.sh GRID.yaml --summary        only summarise what is there
    bash run_ablation.sh GRID.yaml --check          read the grid and list its runs

Exit status: 0 all runs are finished; 1 some failed (the summary names them); 2 wrong input; 130, 143 interrupted or terminated.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ablation.grid import Grid, load_grid
from ablation.running import Runner, Slot, end_on_signals
from common.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Run one command line (without the program's name); returns the exit status."""
    try:
        arguments, extra = parse(argv)
        grid = load_grid(arguments.grid, out=arguments.out, seeds=arguments.seeds, extra=extra)
        if arguments.check:
            print("\n".join(f"{cell}: train.py {' '.join(cell.train_argv())}" for cell in grid.cells))
            return 0
        return run(grid, arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(grid: Grid, arguments: argparse.Namespace) -> int:
    runner = Runner(grid.cells, make_slots(arguments.jobs, arguments.threads), on_change=lambda: None)
    received = end_on_signals(runner)
    failed = runner.run()
    return 128 + received[0] if received else int(failed > 0)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="run_ablation.sh", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("--jobs", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[])
    parser.add_argument("--check", action="store_true")
    return parser.parse_known_args(argv)


def make_slots(jobs: int, threads: int) -> list[Slot]:
    """As many places as runs at once, dealt to the visible GPUs in turn."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    gpus = gpus if torch.cuda.is_available() else []
    jobs = jobs or max(1, len(gpus))
    threads = threads or max(1, len(os.sched_getaffinity(0)) // jobs)
    return [Slot(gpus[number % len(gpus)] if gpus else "", threads) for number in range(jobs)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
