"""Train and evaluate the cells of a grid in parallel, on this machine and on others that share the folder.

A lock in its folder marks a cell as taken, so several programs can work on one grid. Each program takes the next cell that
is ready, unfinished and not taken. Trainings and evaluations that are finished on disk are skipped. train.py and
runner_aa_eval.py resume interrupted ones.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from ablation.grid import Cell, Entry
from common.errors import UserError
from common.files import read_json, take_folder, writable, write_atomically
from common.provenance import PROJECT, commit
from training.stop import STOPPED

RECORD = "record.json"
# Keys of an evaluation's report that a summary reads, besides the accuracies.
REPORT = {"norm": str, "eps": (int, float), "seed": int, "attacks": list, "n": int, "data": dict}
DIVERGED = 3  # exit status of train.py; training again would diverge again
POLL_SECONDS = 2.0


@dataclass(frozen=True)
class Place:
    """A slot for one cell at a time: a GPU ("" for the CPU) and a number of CPU threads."""

    gpu: str
    threads: int

    def environment(self) -> dict[str, str]:
        more = {"CUDA_VISIBLE_DEVICES": self.gpu, "OMP_NUM_THREADS": str(self.threads)}
        # Waiting OpenMP threads spin, which slows down other busy programs on the machine. Let them spin only briefly.
        return {"GOMP_SPINCOUNT": "10000", **os.environ, **more}

    def eval_flags(self) -> list[str]:
        if self.gpu:
            return ["--eval.gpus=0"]  # the only visible GPU; "auto" would wait for other runs on it
        return ["--eval.gpus=none", f"--eval.workers={self.threads}"]


# ------------------------------------------------------------------------------------------- state on disk
def json_or_nothing(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file, {} if the file is missing, damaged or not a mapping."""
    with suppress(UserError):
        return read_json(path) or {}
    return {}


def read_record(cell: Cell) -> dict[str, dict[str, Any]]:
    """Return the record of a cell: `stages` with `status`, `reason` and `seconds` of `train` and of each evaluation.

    Damaged stages are omitted.
    """
    stages = json_or_nothing(cell.folder / RECORD).get("stages")
    stages = stages if isinstance(stages, dict) else {}
    return {"stages": {name: call for name, call in stages.items() if _is_call(call)}}


def train_status(cell: Cell) -> str:
    """Return the status in the run folder: running, stopped, finished, failed or diverged; "" if missing or damaged."""
    return str(json_or_nothing(cell.run_folder / "status.json").get("status", ""))


def has_its_images(cell: Cell) -> bool:
    """Return whether the run was trained on images at the cell's path; if not, train.py has to check the images."""
    try:
        before = json_or_nothing(cell.run_folder / "params.json")["data"]["train_dataset"]
    except (KeyError, TypeError):  # damaged
        return True
    return os.path.normpath(before) == os.path.normpath(cell.config.data.train_dataset)


def evaluation_summary(cell: Cell, entry: Entry) -> dict[str, Any] | None:
    """Return summary.json of a finished evaluation, None if it is missing or damaged."""
    summary = json_or_nothing(cell.eval_folder(entry) / "summary.json")
    reports = summary.get("evaluations")
    return summary if isinstance(reports, list) and all(map(_is_report, reports)) else None


def is_share(value: Any) -> bool:
    """Return whether `value` is a number in [0, 1]."""
    return isinstance(value, (int, float)) and 0 <= value <= 1


def _is_call(call: Any) -> bool:
    if not isinstance(call, dict) or not isinstance(call.get("seconds"), (int, float)):
        return False
    return 0 <= call["seconds"] < math.inf and all(isinstance(call.get(key), str) for key in ("status", "reason"))


def _is_report(report: Any) -> bool:
    """Return whether `report` is the report of one evaluation."""
    if not isinstance(report, dict) or any(not isinstance(report.get(key), kind) for key, kind in REPORT.items()):
        return False
    shares = is_share(report.get("clean_acc")) and is_share(report.get("robust_acc"))
    return shares and report["n"] > 0 and isinstance(report["data"].get("img_size"), int)


def is_finished(cell: Cell) -> bool:
    trained = train_status(cell) == "finished" and has_its_images(cell)
    return trained and all(evaluation_summary(cell, e) is not None for e in cell.entries())


# --------------------------------------------------------------------------------------------------- scheduling
class Runner:
    """Scheduler that trains and evaluates cells until all are finished or failed."""

    def __init__(self, cells: Sequence[Cell], slots: Sequence[Place], *, on_change: Callable[[], None]) -> None:
        """Prepare the runner; `run` calls `on_change` after each cell, in its own thread."""
        self._cells, self._slots, self._on_change = list(cells), list(slots), on_change
        self._children: set[subprocess.Popen] = set()
        self._guard = threading.RLock()  # reentrant: a signal may arrive inside stop()
        self._stopping = False

    def run(self) -> int:
        """Run all cells and return the exit status: 0 all finished; 1 some failed, or start from a failed one; 75 stopped."""
        state = {(cell.arm.name, cell.seed): "finished" if is_finished(cell) else "open" for cell in self._cells}
        if done := sum(value == "finished" for value in state.values()):
            say(f"{done} of {len(state)} runs are already finished and skipped.")
        free, busy = list(self._slots), {}
        with ThreadPoolExecutor(len(self._slots)) as pool:
            try:
                while ("open" in state.values() and not self._stopping) or busy:
                    started = not self._stopping and self._start(state, free, busy, pool)
                    if busy:
                        wait(busy, timeout=POLL_SECONDS, return_when="FIRST_COMPLETED")
                    elif not started:
                        time.sleep(POLL_SECONDS)
                    self._collect(state, free, busy)
            except BaseException:
                self.stop()
                raise
        return STOPPED if self._stopping else int("failed" in state.values())

    def _start(self, state: dict, free: list[Place], busy: dict[Future, tuple], pool: ThreadPoolExecutor) -> bool:
        """Start a cell on every free slot, as long as cells are ready; return whether any started."""
        started = False
        for cell in self._cells:
            key = (cell.arm.name, cell.seed)
            if state[key] != "open" or not free:
                continue
            if is_finished(cell):  # finished by another program
                state[key] = "finished"
                continue
            if cell.parent and train_status(cell.parent) != "finished":
                if state[cell.parent.arm.name, cell.seed] == "failed":
                    state[key] = "failed"
                    note(cell, "train", "not run", f"{cell.parent} did not finish", 0.0)
                    self._on_change()
                continue
            lock = _claim(cell)
            if lock is None:
                continue
            slot = free.pop(0)
            state[key], started = "running", True
            busy[pool.submit(self._work, cell, slot, lock)] = (key, slot)
        return started

    def _collect(self, state: dict, free: list[Place], busy: dict[Future, tuple]) -> None:
        for future in [future for future in busy if future.done()]:
            key, slot = busy.pop(future)
            free.append(slot)
            state[key] = "finished" if future.result() else "failed"
            self._on_change()

    def stop(self) -> None:
        """Ask the running programs to save their state and exit, and start no others."""
        self._stopping = True
        with self._guard:
            children = list(self._children)
        for child in children:
            with suppress(ProcessLookupError):
                child.terminate()

    # -------------------------------------------------------------------------------- one cell, in a thread
    def _work(self, cell: Cell, slot: Place, lock: BinaryIO) -> bool:
        """Train, then evaluate; return whether both are finished."""
        with lock:
            if not self._train(cell, slot, lock):
                return False
            done = [
                self._evaluate(cell, entry, slot, lock) for entry in cell.entries()
            ]  # a failure does not stop the others
            return all(done)

    def _train(self, cell: Cell, slot: Place, lock: BinaryIO) -> bool:
        status = train_status(cell)
        if status == "finished" and has_its_images(cell):
            return True
        if status == "diverged":
            return False
        say(f"{cell}: training")
        return self._call(cell, "train", [str(PROJECT / "train.py"), *cell.train_argv()], slot, lock)

    def _evaluate(self, cell: Cell, entry: Entry, slot: Place, lock: BinaryIO) -> bool:
        if evaluation_summary(cell, entry) is not None:
            return True
        say(f"{cell}: evaluation {entry.name}")
        return self._call(
            cell,
            entry.name,
            [str(PROJECT / "runner_aa_eval.py"), *cell.eval_argv(entry), *slot.eval_flags()],
            slot,
            lock,
        )

    def _call(self, cell: Cell, stage: str, argv: list[str], slot: Place, lock: BinaryIO) -> bool:
        """Run a program of the project with its output in a file; return whether it succeeded."""
        output = cell.folder / f"{stage}.out"
        began = time.monotonic()
        with open(output, "ab") as file:
            with self._guard:
                if self._stopping:
                    return False
                child = subprocess.Popen(
                    [sys.executable, *argv],
                    env=slot.environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,  # Ctrl-C reaches the child only through stop()
                    pass_fds=[lock.fileno()],  # the child keeps the lock if this program is killed
                )
                self._children.add(child)
            status = child.wait()
            with self._guard:
                self._children.discard(child)
        seconds = time.monotonic() - began
        if status == STOPPED:  # a file `stop`, or the end of a Slurm job: later programs would stop too
            self.stop()
        if self._stopping and status != 0:
            note(cell, stage, "stopped", "stopped on request", seconds)
            return False
        name = "finished" if status == 0 else "diverged" if status == DIVERGED else "failed"
        reason = "" if status == 0 else f"status {status}: {_last_words(output)}"
        note(cell, stage, name, reason, seconds)
        if status:
            say(f"{cell}: {stage} {name}, {reason} (full output: {output})")
        return status == 0


def note(cell: Cell, stage: str, status: str, reason: str, seconds: float) -> None:
    """Write a stage to the cell's record; seconds accumulate over restarts."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    record = read_record(cell)
    stages = record["stages"]
    before = stages.get(stage, {}).get("seconds", 0.0)
    stages[stage] = {"status": status, "reason": reason, "seconds": round(before + seconds, 1), "commit": commit()}
    content = json.dumps(record, indent=2).encode()
    write_atomically(cell.folder / RECORD, lambda file: file.write(content))


def _claim(cell: Cell) -> BinaryIO | None:
    """Take the lock of a cell; return None if another program has it."""
    with writable("--out", cell.folder):
        cell.folder.mkdir(parents=True, exist_ok=True)
        try:
            return take_folder(cell.folder)
        except UserError:
            return None


def _last_words(output: Path) -> str:
    """Return the last error in a program's output, or else its last line."""
    lines = [
        line.strip() for line in output.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()
    ]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["nothing printed"])[-1].removeprefix("error:").strip()


def say(text: str) -> None:
    """Print one line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


@contextmanager
def stopping_on_signals(runner: Runner) -> Iterator[list[int]]:
    """Stop the runner on SIGTERM and SIGINT; yield a list that receives the signal."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        runner.stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
