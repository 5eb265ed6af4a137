"""A training run that is killed at random moments and started again, against one that is left alone: `benchmarks.kills training`.

SIGKILL goes to the main process or, with several, to each in turn: the others have to end by themselves, what is on disk
has to be whole, and the last start has to end in the same weights and the same log, to the last bit.
"""

from __future__ import annotations

import json
import random
import socket
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch

from benchmarks.harness import Row, row
from benchmarks.killing import PATIENCE, POLL_SECONDS, Run
from common.config import TrainConfig, load_config
from common.errors import UserError
from common.provenance import PROJECT

STATES, STATUS = ("last.pt", "last.previous.pt"), "status.json"
TIMINGS = ("seconds", "per_second", "data_wait")  # ends of the names of values that may differ
LIMIT = 1800.0  # seconds that a run may take once it is left alone
IN_STARTS = 0.2  # share of the kills that hit a run before it trains
WORKERS = (0, 2)  # loader processes of a start; which, must not matter
GLOBAL_BATCH = 32
# All that draws random numbers is on: heavy augmentation, mixup, drop path. An EMA doubles what has to be kept.
FLAGS = (
    "--config-file",
    str(PROJECT / "configs" / "demo_robust.yaml"),
    "--model.not_original=1",
    "--model.drop_path=0.1",
    "--model.model_ema=1",
    "--model.ema_warmup=1",
    "--data.augmentations=1",
    "--validation.freq=1",
    "--validation.adv_n_ex=32",
    "--validation.adv_n_iter=2",
    "--logging.save_freq=1",
    "--logging.log_level=2",
    "--logging.ckpt_minutes=0.015",
)

Key = tuple[str, Any]  # kind of a record of the log, and its step
Records = dict[Key, list[dict[str, Any]]]


@dataclass
class Outcome:
    """What the kills did.

    Attributes:
        kills, kills_of_one: runs killed, and those of them where another process than the main one was hit.
        runs: that came to their end; after the first, the others were started to have time for all kills.
        start_seconds, work_seconds: of the undisturbed run: until it said that it trains, and from there to the end.
        steps, records: of one run: optimiser steps, and lines of the log.
        tensors, weights_different: in all files of weights, and those that are not the undisturbed run's to the last bit.
        log_missing, log_doubled, log_different: records that the logs at the end lack, have too often, or with other values.
        log_invalid: lines of theirs that are no record.
        states, states_damaged: states read after kills; those that could not be read, had gone, or were older than before.
        left_behind: processes that still ran `PATIENCE` seconds after a kill.
        kept: for each kill, the steps in the newest state.
        seconds_lost: for each kill of a run that trained, its time since its start or its newest state.
        restart_seconds: for each start that went on, until it said that it trains.
        vanish_seconds: for each kill, until the last process had ended.
    """

    kills: int = 0
    kills_of_one: int = 0
    runs: int = 0
    start_seconds: float = 0.0
    work_seconds: float = 0.0
    steps: int = 0
    records: int = 0
    tensors: int = 0
    weights_different: int = 0
    log_missing: int = 0
    log_doubled: int = 0
    log_different: int = 0
    log_invalid: int = 0
    states: int = 0
    states_damaged: int = 0
    left_behind: int = 0
    kept: list[int] = field(default_factory=list)
    seconds_lost: list[float] = field(default_factory=list)
    restart_seconds: list[float] = field(default_factory=list)
    vanish_seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Training:
    """A command that is started again and again.

    Attributes:
        flags: of train.py, without logging.folder, data.num_workers, and those of the processes.
        folder: for the run folder.
        processes: that train together.
    """

    flags: Sequence[str]
    folder: Path
    processes: int

    def argv(self, workers: int) -> list[str]:
        """All flags; the number of loader processes and the port of the first process may be others at every start."""
        argv = [*self.flags, f"--logging.folder={self.folder}", f"--data.num_workers={workers}"]
        if self.processes > 1:
            argv += ["--training.distributed=1", f"--dist.world_size={self.processes}", f"--dist.port={_free_port()}"]
        return argv

    def start(self, workers: int) -> Run:
        return Run(["train.py", *self.argv(workers)])

    @property
    def run_folder(self) -> Path:
        return self.folder / load_config(TrainConfig, self.argv(0)).run_name


def kill_training(
    flags: Sequence[str], folder: Path, *, processes: int, kills: int, seed: int, in_starts: float = IN_STARTS
) -> Outcome:
    """Train undisturbed, then again and again until `kills` starts were killed and the last came to its end.

    Args:
        flags: of train.py, as in `Training`; with logging.log_level=2, and a logging.ckpt_minutes that leaves several states.
        folder: for run folders.
        processes: that train together.
        kills: how many.
        seed: of moments and numbers of loader processes.
        in_starts: share of the kills that come before the run trains.

    Raises:
        UserError: a run failed by itself, or came to no end.
    """
    chance, outcome = random.Random(seed), Outcome()
    undisturbed = Training(flags, folder / "undisturbed", processes)
    _train_undisturbed(undisturbed, outcome)
    # On average the kills come while 80 % of the work is done, so that mostly one run is enough for all of them; each comes
    # early enough to hit a run that goes as fast as the undisturbed one.
    latest = min(2 * 0.8 / max(kills * (1 - in_starts), 1), 0.8) * outcome.work_seconds
    number, newest, unfinished = 0, 0, False
    while outcome.kills < kills or unfinished:
        training = Training(flags, folder / f"killed_{number}", processes)
        workers = chance.choice(WORKERS)
        if outcome.kills == kills:
            unfinished = False
            with training.start(workers) as run:
                _let_end(run)
        elif chance.random() < in_starts:
            unfinished = _start_and_kill(
                training, workers, chance, outcome, in_start=True, latest=outcome.start_seconds
            )
        else:
            unfinished = _start_and_kill(training, workers, chance, outcome, in_start=False, latest=latest)
        if unfinished:
            newest = look_at_states(training.run_folder, newest, outcome)
        else:
            outcome.runs += 1
            compare_runs(undisturbed.run_folder, training.run_folder, outcome)
            number, newest = number + 1, 0
    return outcome


def _train_undisturbed(training: Training, outcome: Outcome) -> None:
    begin = time.time()
    with training.start(workers=0) as run:
        started = _wait_for_training(run, training, begin)
        _let_end(run)
    if started is None:
        raise UserError(f"train.py: {training.run_folder / STATUS} did not say that the run trains.")
    outcome.start_seconds, outcome.work_seconds = started - begin, time.time() - started
    records, _ = read_log(training.run_folder / "log")
    outcome.records, outcome.steps = sum(map(len, records.values())), max(step for _, step in records)


def _start_and_kill(
    training: Training, workers: int, chance: random.Random, outcome: Outcome, *, in_start: bool, latest: float
) -> bool:
    """Kill a run `latest` seconds after its start, or after it says that it trains, or sooner; False where it ended before."""
    goes_on, begin = _newest_state(training.run_folder) > 0, time.time()
    with training.start(workers) as run:
        trains_since = begin if in_start else _wait_for_training(run, training, begin)
        death = None
        if trains_since is not None and not run.ends_before(chance.uniform(0, latest)):
            seconds_lost = time.time() - max(trains_since, _newest_state(training.run_folder))
            targets = [*(sorted(run.children()) if training.processes > 1 else ()), run.main]
            victim = targets[outcome.kills % len(targets)]
            death = run.kill(victim)
    if death is None:
        run.check()
        return False
    outcome.kills += 1
    outcome.kills_of_one += victim != run.main
    outcome.left_behind += death.left
    outcome.vanish_seconds.append(death.seconds)
    if not in_start:
        outcome.seconds_lost.append(seconds_lost)
        if goes_on:
            outcome.restart_seconds.append(trains_since - begin)
    return True


def _wait_for_training(run: Run, training: Training, begin: float) -> float | None:
    """Wait until the run, started at `begin`, says that it trains; returns the time, None where it ended before."""
    status = training.run_folder / STATUS
    while not status.exists() or status.stat().st_mtime <= begin:
        if run.ends_before(POLL_SECONDS):
            return None
    return time.time()


def _let_end(run: Run) -> None:
    if not run.ends_before(LIMIT):
        raise UserError(f"train.py: no end after {LIMIT:g} s without a kill.")
    run.check()


def _newest_state(folder: Path) -> float:
    """When it was written; 0 where there is none."""
    return max((path.stat().st_mtime for name in STATES if (path := folder / name).exists()), default=0.0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def look_at_states(folder: Path, known: int, outcome: Outcome) -> int:
    """The steps in the newest state; counts states that cannot be read, and none as new as the `known` one."""
    steps = []
    for path in (folder / name for name in STATES):
        if path.exists():
            outcome.states += 1
            try:
                steps.append(_steps_in(path))
            except (OSError, RuntimeError, ValueError, KeyError, EOFError, BadZipFile, UnpicklingError):
                outcome.states_damaged += 1
    newest = max(steps, default=0)
    outcome.states_damaged += newest < known
    outcome.kept.append(newest)
    return max(newest, known)


def _steps_in(path: Path) -> int:
    with ZipFile(path) as archive:
        if (name := archive.testzip()) is not None:  # torch.load does not look at checksums
            raise ValueError(f"{path}: {name} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)["step"]


def compare_runs(expected: Path, folder: Path, outcome: Outcome) -> None:
    """Count what differs between the folders of two finished runs."""
    for name in sorted(path.name for path in expected.glob("weights*.pt")):
        tensors, different = compare_weights(expected / name, folder / name)
        outcome.tensors += tensors
        outcome.weights_different += different
    (wanted, _), (found, invalid) = read_log(expected / "log"), read_log(folder / "log")
    outcome.log_invalid += invalid
    for key in wanted.keys() | found.keys():
        missing = len(wanted[key]) - len(found[key])
        outcome.log_missing += max(missing, 0)
        outcome.log_doubled += max(-missing, 0)
        outcome.log_different += sum(record not in wanted[key] for record in found[key]) if wanted[key] else 0


def compare_weights(expected: Path, path: Path) -> tuple[int, int]:
    """Number of tensors in the file `expected`, and of those that `path` does not hold to the last bit."""
    wanted = torch.load(expected, weights_only=True)
    found = torch.load(path, weights_only=True) if path.exists() else {}
    same = sum(name in found and _bits(tensor) == _bits(found[name]) for name, tensor in wanted.items())
    return len(wanted), len(wanted) - same + len(found.keys() - wanted.keys())


def _bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.numpy().tobytes()


def read_log(path: Path) -> tuple[Records, int]:
    """Records of a run's log by kind and step, without their timings; and the number of lines that are no record."""
    records, invalid = defaultdict(list), 0
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
            key = ("epoch" if "top1" in record else "step", record["step"])
        except (ValueError, TypeError, KeyError):
            invalid += 1
            continue
        records[key].append({name: value for name, value in record.items() if not name.endswith(TIMINGS)})
    return records, invalid


def training_rows(outcome: Outcome, kills: int, *, suffix: str) -> list[Row]:
    """The figures of `kill_training`; `suffix` of their names."""
    o = outcome
    fruitful = sum(after > before for before, after in zip([0, *o.kept], o.kept))
    runs = f"of {o.runs} {'run' if o.runs == 1 else 'runs'}"
    step_seconds = o.work_seconds / max(o.steps, 1)
    repeated = [seconds / step_seconds for seconds in o.seconds_lost]
    rows = [
        row(
            "kills",
            [o.kills],
            "kills",
            f"== {kills}",
            note=f"{o.kills_of_one} of one rank; {fruitful} after new states",
        ),
        row("weights_different", [o.weights_different], "tensors", "== 0", note=f"{runs}, {o.tensors} tensors"),
        row("log_missing", [o.log_missing], "records", "== 0", note=f"{runs} with {o.records} records each"),
        row("log_doubled", [o.log_doubled], "records", "== 0"),
        row("log_different", [o.log_different], "records", "== 0", note="apart from timings"),
        row("log_invalid_lines", [o.log_invalid], "lines", "== 0"),
        row("states_damaged", [o.states_damaged], "states", "== 0", note=f"of {o.states} read after kills"),
        row("processes_left", [o.left_behind], "processes", "== 0", note=f"{PATIENCE:g} s after a kill"),
        _of_each("vanish_seconds", o.vanish_seconds, "s", "until the last process of a killed run has ended"),
        _of_each("steps_repeated", repeated, "steps", f"of {o.steps}, for each kill at work; from times"),
        _of_each(
            "restart_seconds", o.restart_seconds, "s", f"until it trains; the first start: {o.start_seconds:.1f} s"
        ),
        row("steps_kept", o.kept or None, "steps", note=f"in the state at each kill: {' '.join(map(str, o.kept))}"),
    ]
    return [{**r, "name": r["name"] + suffix} for r in rows]


def _of_each(name: str, figures: Sequence[float], unit: str, note: str) -> Row:
    return row(name, figures or None, unit, note=note)
