"""All evaluations of a call: plan → open chunks → work queue → records → reports."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from common.errors import UserError
from common.processes import Processes
from data.loader import print_warning
from evaluation import worker
from evaluation.board import Board
from evaluation.config import EvalConfig
from evaluation.gpus import find_devices, gpus_in_question
from evaluation.plan import Evaluation, Plan, make_plan, open_planned_images
from evaluation.records import StateFolder
from evaluation.report import read_report, write_evaluation, write_overview
from evaluation.stopping import chunks_enough
from evaluation.worker import Task
from evaluation.workqueue import WORKER_POLL_SECONDS, TaskFailed, prepare_workers, run_tasks

SAVE_AGAIN_SECONDS = 10  # between two attempts to write records after a failed write
GIVE_UP_SECONDS = 600  # of failed writes after which the run fails, once the last chunk is finished
LINE_SECONDS = 60  # between two progress lines if stderr is not a terminal


@dataclass(frozen=True)
class Outcome:
    """All evaluations of a call and their reports, in the order of the plan."""

    evaluations: list[Evaluation]
    reports: list[dict[str, Any]]


def run_evaluations(config: EvalConfig, processes: Processes) -> Outcome | None:
    """Evaluate every network of `config` at every size under every norm; resume from the finished chunks of earlier calls.

    Under torchrun, every process calls this. The first process plans and writes; each process uses its own GPU.

    Returns:
        The outcome on the first process; None on the others.

    Raises:
        UserError: wrong input, or a state folder that belongs to another evaluation or is in use by another run.
        TaskFailed: a chunk failed three times.
    """
    prepare_workers("evaluation.worker")
    board = Board(processes, "evaluation")
    first = _Coordinator(config, board) if processes.is_first else None
    try:
        evaluations, tasks = processes.broadcast(processes.on_first(lambda: first.prepare()))
        _work(config, board, evaluations, tasks, first)
        return processes.on_first(lambda: first.finish())
    finally:
        if first:
            first.close()


def _work(
    config: EvalConfig, board: Board, evaluations: list[Evaluation], tasks: Sequence[Task], first: _Coordinator | None
) -> None:
    """Process open chunks until no process has one left."""

    def take() -> Task | None:
        while (number := board.take()) < len(tasks):
            if not board.skipped(tasks[number].evaluation):
                return tasks[number]
        return None

    def is_open() -> bool:
        if first:
            first.collect()
        return board.closed() is None

    try:
        if tasks:
            devices = find_devices(config.eval, chunks=len(tasks))
            here, planned = devices[0].split(":")[0], evaluations[0].identity["arithmetic"]["device"]
            if here != planned:  # device type of the first process; verdicts of GPUs and CPUs must not be mixed
                raise UserError(
                    f"torchrun: the first process uses {planned}, another process {here}; expected GPUs on all machines, or "
                    "eval.gpus=none, which uses the CPU on all."
                )
            images = first.plan.images if first else open_planned_images(config, evaluations)
            if first:
                first.begin(devices, tasks)
            arguments = (config, evaluations, images)
            with closing(run_tasks(take, slots=devices, setup=worker.setup, arguments=arguments)) as events:
                for event in events:
                    if event[0] != "tick":
                        board.post(json.dumps(event).encode())
                    if not is_open():
                        break
        while is_open():
            time.sleep(WORKER_POLL_SECONDS)
    except (UserError, TaskFailed) as error:
        board.close(str(error))
        raise
    if board.closed():
        raise TaskFailed(board.closed())


@dataclass
class _State:
    """An evaluation, its folder, its finished chunks by number, and its report, once written."""

    evaluation: Evaluation
    folder: StateFolder
    records: dict[int, dict[str, Any]] = field(default_factory=dict)
    report: dict[str, Any] | None = None


class _Coordinator:
    """Tasks of the first process only: plan, store records, show progress, write reports."""

    def __init__(self, config: EvalConfig, board: Board) -> None:
        self._config, self._board = config, board
        self.plan: Plan | None = None
        self._states: list[_State] = []  # of the plan's evaluations
        self._unsaved: list[tuple[StateFolder, dict[str, Any]]] = []  # records not yet written
        self._failing_since: float | None = None  # time of the first failed write
        self._save_at = 0.0
        self._bar: tqdm | None = None

    def prepare(self) -> tuple[list[Evaluation], list[Task]]:
        """Return the evaluations and their open chunks; lock the state folders against other runs.

        Raises:
            UserError: wrong input.
        """
        settings = self._config.eval
        self.plan = make_plan(self._config, on_gpu=bool(gpus_in_question(settings)))
        evaluations = self.plan.evaluations
        for evaluation in evaluations:
            state = _State(evaluation, StateFolder(evaluation.folder))
            self._states.append(state)
            state.folder.open(evaluation.identity)
            state.records = state.folder.read(evaluation.chunks, with_images=settings.save_adv)
        tasks: list[Task] = []
        for number, state in enumerate(self._states):
            enough, chunks = self._enough(state), range(state.evaluation.chunks)
            if enough is None:
                tasks += [Task(number, chunk) for chunk in chunks if chunk not in state.records]
            elif report := read_report(state.evaluation, chunks=enough, ci=settings.ci):
                print(f"{state.evaluation}: already finished, skipped.", file=sys.stderr)
                state.report = report
                state.folder.close()
        if settings.ci:  # interleaved: all norms of a network reach the same number of images together
            groups = [evaluation.group for evaluation in evaluations]
            tasks.sort(key=lambda task: (groups.index(groups[task.evaluation]), task.chunk))
        return evaluations, tasks

    def begin(self, devices: Sequence[str], tasks: Sequence[Task]) -> None:
        """Start the progress bar; called after the wait for free GPUs."""
        still = sum(len(self._states[task.evaluation].evaluation.positions(task.chunk)) for task in tasks)
        total = sum(state.evaluation.n for state in self._states)
        # If stderr is not a terminal, print a line every LINE_SECONDS.
        lines = {"mininterval": LINE_SECONDS, "bar_format": "{l_bar}{bar}{r_bar}\n"}
        how = {"mininterval": 0, "dynamic_ncols": True} if sys.stderr.isatty() else lines
        self._bar = tqdm(total=total, initial=total - still, unit="img", smoothing=0, miniters=0, leave=False, **how)
        where = ", ".join(f"{count} × {device}" for device, count in Counter(devices).items())
        tqdm.write(
            f"{len(tasks)} {'chunk' if len(tasks) == 1 else 'chunks'} to do; workers of this process: {where}",
            file=sys.stderr,
        )

    def collect(self) -> None:
        """Receive the messages of all processes, retry failed writes, and close the board when all reports are written."""
        for message in self._board.messages():
            kind, task, content = json.loads(message)
            if task is None:
                print_warning(f"a worker failed: {content}")
                continue
            state, chunk = self._states[task[0]], task[1]
            if kind == "failed":
                print_warning(f"chunk {chunk} of {state.evaluation} failed: {content}")
            elif kind == "note":
                self._show(f"chunk {chunk} at {content}")
            elif state.report is None:  # else the report already has enough chunks
                self._receive(state, content)
        if time.monotonic() >= self._save_at:
            self._save()
        if all(state.report is not None for state in self._states):
            self._board.close()

    def _show(self, text: str, *, images: int = 0) -> None:
        """Show a status text; advance the bar by `images`."""
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(images)

    def _receive(self, state: _State, record: dict[str, Any]) -> None:
        """Store the record of a finished chunk."""
        state.records[record["chunk"]] = record
        verdicts = [broken for some in state.records.values() for broken in some["broken_by"]]
        robust = verdicts.count("") / max(len(verdicts), 1)
        self._bar.set_description_str(str(state.evaluation), refresh=False)
        self._show(f"robust {robust:.1%}", images=len(record["positions"]) + len(record["unreadable"]))
        self._unsaved.append((state.folder, record))
        self._save()

    def _save(self) -> None:
        """Write records and the reports of complete evaluations; after a failed write, keep them for the next attempt.

        Raises:
            UserError: all chunks are finished, but writing has failed for `GIVE_UP_SECONDS`.
        """
        try:
            while self._unsaved:
                folder, record = self._unsaved[0]
                folder.write(record)
                self._unsaved.pop(0)
            for number, state in enumerate(self._states):
                if state.report is None and (enough := self._enough(state)) is not None:
                    self._report(number, state, enough)
            self._failing_since, self._save_at = None, math.inf
        except OSError as error:
            now, problem = time.monotonic(), f"cannot write to {self.plan.root} ({error.strerror or error})"
            if self._failing_since is None:
                self._failing_since = now
                print_warning(
                    f"eval.out: {problem}; the finished chunks ({len(self._unsaved)}) are kept in memory; writing is retried every "
                    f"{SAVE_AGAIN_SECONDS} seconds."
                )
            all_done = all(self._enough(state) is not None for state in self._states)
            if all_done and now - self._failing_since >= GIVE_UP_SECONDS:
                raise UserError(f"eval.out: {problem}; {len(self._unsaved)} chunks are lost.") from error
            self._save_at = now + SAVE_AGAIN_SECONDS

    def _enough(self, state: _State) -> int | None:
        """Return how many first chunks the report of an evaluation covers; None while chunks are missing.

        With `eval.ci`, the number is the same for all norms of a network.
        """
        chunks, points, members = state.evaluation.chunks, self._config.eval.ci, [state]
        if points:
            members = [other for other in self._states if other.evaluation.group == state.evaluation.group]
        records = [member.records for member in members]
        if points and (enough := chunks_enough(records, points=points)):
            return enough
        return chunks if all(len(some) == chunks for some in records) else None

    def _report(self, number: int, state: _State, chunks: int) -> None:
        evaluation, points = state.evaluation, self._config.eval.ci
        records = [state.records[chunk] for chunk in range(chunks)]
        images, examples = self.plan.images[evaluation.network], state.folder.images_file(0)
        report = write_evaluation(evaluation, records, images, self._config, examples)
        if chunks < evaluation.chunks:
            text = f"{report['n']} of {evaluation.n} images are enough for ± {points:g} percentage points."
            tqdm.write(f"{evaluation}: {text}", file=sys.stderr)
        state.report = report
        state.folder.close()
        self._board.skip(number)

    def finish(self) -> Outcome:
        """Write the table, summary and picture of all evaluations."""
        self.close()
        evaluations, reports = self.plan.evaluations, [state.report for state in self._states]
        write_overview(evaluations, reports, self.plan.root, save_adv=self._config.eval.save_adv)
        return Outcome(evaluations, reports)

    def close(self) -> None:
        """Unlock the state folders and remove the progress bar."""
        if self._bar is not None:
            self._bar.close()
        for state in self._states:
            state.folder.close()
