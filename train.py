#!/usr/bin/env python3
"""Adversarial training of image classifiers.

Every flag is `--section.name=value` (or `--section.name value`); `--help` lists them, `--config-file FILE` reads them from YAML,
and flags override the file.

    python train.py --config-file configs/convnext_tiny_cvst.yaml --data.train_dataset=/data/imagenet …
    python train.py … --training.distributed=1 --dist.world_size=8      eight processes on this machine
    torchrun --nproc_per_node=8 train.py …                              the same, started by torchrun (several machines too)
    bash run_train.sh …                                                 sets up the environment, uses all visible GPUs
    python train.py --check …                                           checks flags, files and folders, starts nothing
    python train.py --where …                                           prints the run's folder

A run: images in [0, 1] → mixup → attack on the network in eval mode → forward, loss, backward → optimiser → EMA; every
`validation.freq` epochs validation on clean and attacked images; weights, log and training state in <logging.folder>/<run name>.

SIGTERM, SIGINT, SIGUSR1, a file `stop` in the run's folder, or the end of a Slurm job stop a run: it finishes the step and saves
the state. The same command resumes from there. After a crash it resumes from the state saved last (`training.resume`).

Exit status: 0 the run is finished; 2 wrong input; 3 training diverged; 75 stopped on request, the same command resumes; 130 stopped
at once by a second Ctrl-C; 1 anything else. `status.json` in the run's folder contains the same, also if torchrun loses the status.
(With --max-restarts, torchrun would restart a run that exits with 75, so there a stop exits with 0.)
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import Problems, UserError, blame, blame_arguments
from common.flags import load_config
from common.forkserver import SIGNALS, start_fork_server
from training.config import TrainConfig
from training.identity import find_folder
from training.stop import STOPPED, leave_on_signals

# PyTorch is imported only where it is used: `--help` and `--where` do not need it, and several processes import it in parallel.
if TYPE_CHECKING:
    from common.processes import Processes
    from training.resume import Start


def main(argv: Sequence[str]) -> int:
    """Run one command line (without the program's name); return the exit status."""
    asked, flags = switches().parse_known_args(argv)
    try:
        problems = Problems()
        config = load_config(TrainConfig, flags, switches=switches(), problems=problems)
        if "where" in asked:
            problems.report()
            print(find_folder(config)[0])
            return 0
        if "check" in asked or problems.found:
            check(config, problems.found)
            return 0
        dist = config.dist
        if dist.world_size > 1 and "RANK" not in os.environ:
            start_fork_server("training.trainer")
        from training.launch import launch

        return launch(
            run_process,
            config,
            world_size=dist.world_size,
            address=dist.address,
            port=dist.port,
            timeout=timedelta(minutes=dist.timeout_minutes),
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def switches() -> argparse.ArgumentParser:
    """Return the parser of what is asked instead of training."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help="check flags, files and folders, and start nothing")
    parser.add_argument("--where", action="store_true", help="print the run's folder, and start nothing")
    return parser


def run_process(config: TrainConfig, processes: Processes) -> None:
    """Run one process of the run."""
    from training.resume import begin

    start = begin(config, processes)
    before = start.state and start.state["config"]["training"]["precision"]
    config = config.on(processes.device.type, begun_with=before)
    try:
        if not start.finished:
            train_from(start, config, processes)
        elif processes.is_first:
            tell_finished(start, config)
    finally:
        start.release()


def tell_finished(start: Start, config: TrainConfig) -> None:
    """Print that the run is finished, and warn if the flags suggest that another run was meant."""
    from training.advice import forgotten_attack
    from training.console import warn

    began = start.origin and f", which started from {start.origin},"
    print(f"{start.folder}{began} is finished; --training.resume=none trains it from scratch.")
    if note := forgotten_attack(config):
        warn(note)


def train_from(start: Start, config: TrainConfig, processes: Processes) -> None:
    """Build and start the run; raise SystemExit if it stops or diverges."""
    from common.precision import deterministic
    from common.processes import restarted_after_failure
    from training.guard import Diverged
    from training.status import mark_status
    from training.trainer import Stopped, Trainer

    try:
        with deterministic(config.training.deterministic):
            try:
                trainer = Trainer(config, processes, start)
            except Exception as error:
                if start.lock is not None and start.own:
                    mark_status(start.folder, "failed", str(error))
                raise
            trainer.run()
    except Stopped as reason:
        if processes.is_first:
            print(f"stopped: {reason}", file=sys.stderr)
        raise SystemExit(0 if restarted_after_failure() else STOPPED) from reason
    except Diverged as error:
        if processes.is_first:
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(3) from error


def check(config: TrainConfig, known: Sequence[str] = ()) -> None:
    """Check everything that the start of this run needs: data, classes, architecture, weights, training state, processes.

    Raise a UserError with all problems, including those that are `known`. If there are none, print the notes of the start.
    """
    import torch

    from common.files import writable
    from common.processes import Processes, check_processes, check_rendezvous, under_torchrun
    from training.advice import notes_for
    from training.build import MODEL_FLAGS, build_parts, head_notes
    from training.console import warn
    from training.resume import accumulation, find_start
    from utils_architecture import check_pretrained
    from zoo.names import split_kind
    from zoo.published import find_published

    problems, world_size, accum = Problems(), 1, config.training.grad_accum
    initial, notes = False, []
    with problems.caught():
        with blame("dist.world_size"):
            world_size = check_processes(config.dist.world_size)
        if config.dist.world_size > 1 and not under_torchrun():
            with blame("dist.address, dist.port"):
                check_rendezvous(config.dist.address, config.dist.port)
    if config.model.pretrained and not config.model.ckpt_path:
        with problems.caught(), blame_arguments(MODEL_FLAGS):
            check_pretrained(config.model.arch)
    with problems.caught():
        start = find_start(config, *find_folder(config))
        initial = start.state is None and not start.finished
        if start.state is not None and not start.finished:
            accum = accumulation(start.hand_over(), config, world_size)
    # A check neither loads the data set into memory nor downloads anything.
    weights = config.model.ckpt_path
    published = not Path(weights).exists() and find_published(split_kind(weights)[0]) is not None
    quick = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, in_memory=False),
        model=dataclasses.replace(config.model, pretrained=False, ckpt_path="" if published else weights),
    )
    with problems.caught():
        processes = Processes(rank=0, world_size=world_size, device=torch.device("cpu"))
        parts = build_parts(quick, processes, accum=accum, initial=initial)
        if initial:
            # `config`, not `quick`, because `quick` may omit the start weights.
            notes = list(dict.fromkeys([*head_notes(config, parts.train_source), *parts.notes]))
    flags = {problem.split(":")[0] for problem in known}
    problems.found = [*known, *(problem for problem in problems.found if problem.split(":")[0] not in flags)]
    problems.report()
    with writable("logging.folder", folder := Path(config.logging.folder)):
        folder.mkdir(parents=True, exist_ok=True)
    if start.finished:
        return tell_finished(start, config)
    batch = config.training.batch_size * accum * world_size
    steps = config.training.epochs * parts.loader.steps_per_epoch
    # The precision depends on the device, which may be another one than here.
    for note in [*start.notes, *notes, *notes_for(config, "cuda", global_batch=batch, steps=steps)]:
        warn(note)
    print("check passed; nothing was started.")


if __name__ == "__main__":
    leave_on_signals()
    status = main(sys.argv[1:])
    for number in SIGNALS:  # the exit status is fixed now
        signal.signal(number, signal.SIG_IGN)
    sys.exit(status)
