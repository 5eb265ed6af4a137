"""All evaluations of a call: plan → open chunks → work queue → records → reports."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.errors import UserError
from common.files import writable
from common.processes import Processes
from evaluation import worker
from evaluation.board import Board
from evaluation.config import EvalConfig
from evaluation.gpus import find_slots, gpus_in_question
from evaluation.images import ImageList
from evaluation.plan import Evaluation, Plan, make_plan, open_planned_images
from evaluation.progress import ProgressDisplay
from evaluation.records import StateFolder
from evaluation.stopping import chunks_enough
from evaluation.worker import Task
from evaluation.workqueue import WORKER_POLL_SECONDS, TaskFailed, prepare_workers, run_tasks

NEEDED = {"robust_ci95", "chunks", "ci", "run", "published"}  # of a report, for it not to be made again
SAVE_AGAIN_SECONDS = 10  # between two tries to write records that could not be written
GIVE_UP_SECONDS = 600  # after the last chunk


@dataclass(frozen=True)
class Outcome:
    """All evaluations of a call and their reports, in the plan's order; `root` holds table.md, summary.json, accuracy.png."""

    evaluations: list[Evaluation]
    reports: list[dict[str, Any]]
    root: Path


def run_evaluations(config: EvalConfig, processes: Processes) -> Outcome:
    """Evaluate every network of `config` at every size under every norm; goes on where an earlier call ended.

    Under torchrun, every process calls this: the first plans and writes, each works with its own GPU.

    Raises:
        UserError: wrong input, or a state folder of another evaluation or in use by another run.
        TaskFailed: one chunk failed three times.
    """
    prepare_workers("evaluation.worker")
    board = Board(processes, "evaluation")
    first = _Coordinator(config, board) if processes.is_first else None
    try:  # what goes wrong before the work begins must reach every process
        evaluations, tasks, problem = processes.gather(first.prepare() if first else None)[0]
        if problem is not None:
            raise UserError(problem)
        _work(config, board, evaluations, tasks, first)
        return processes.gather(first.finish() if first else None)[0]
    finally:
        if first:
            first.close()


def _work(
    config: EvalConfig, board: Board, evaluations: list[Evaluation], tasks: Sequence[Task], first: _Coordinator | None
) -> None:
    """Do open chunks until none is left anywhere."""

    def on_result(task: Task, record: dict[str, Any]) -> None:
        if first:
            first.receive(task, record)
        else:
            board.post(json.dumps([task, record]).encode())

    def on_note(task: Task, attack: str) -> None:
        if first:
            first.progress.now(task.chunk, attack)

    def on_failure(task: Task | None, reason: str) -> None:
        what = "a worker" if task is None else f"chunk {task.chunk} of {evaluations[task.evaluation]}"
        tqdm.write(f"warning: {what} failed: {reason}", file=sys.stderr)

    def tick() -> bool:
        if first:
            first.collect()
        return board.closed() is None

    def take() -> Task | None:
        while (number := board.take()) < len(tasks):
            if not board.skipped(tasks[number].evaluation):
                return tasks[number]
        return None

    try:
        if tasks:
            slots = find_slots(config.eval, chunks=len(tasks))
            here, planned = slots[0].device.split(":")[0], evaluations[0].identity["arithmetic"]["device"]
            if here != planned:  # of the first process; a GPU's verdicts and a CPU's must not be mixed
                raise UserError(
                    f"torchrun: the first process works on {planned}, another one on {here}; expected GPUs on all machines, or "
                    "eval.gpus=none for the CPU on all."
                )
            if first:
                first.progress.begin(slots)
            images = first.images if first else open_planned_images(config, evaluations)
            run_tasks(
                take,
                slots=slots,
                setup=worker.setup,
                arguments=(config, evaluations, images),
                on_result=on_result,
                on_note=on_note,
                on_failure=on_failure,
                tick=tick,
            )
        while board.closed() is None:
            if first and first.is_done():
                board.close()
            elif tick():
                time.sleep(WORKER_POLL_SECONDS)
    except (UserError, TaskFailed) as error:
        board.close(str(error))
        raise
    if board.closed():
        raise TaskFailed(board.closed())


class _Coordinator:
    """What the first process does alone: plan, keep records, show progress, write reports."""

    def __init__(self, config: EvalConfig, board: Board) -> None:
        self._config, self._board = config, board
        self._plan: Plan | None = None
        self._states: dict[int, StateFolder] = {}  # of the evaluations without a report
        self._records: dict[int, dict[int, dict[str, Any]]] = {}
        self._reports: dict[int, dict[str, Any]] = {}
        self._unsaved: list[tuple[int, dict[str, Any]]] = []  # records that could not be written
        self._tries = _Tries()
        self._waiting: set[Task] = set()
        self.progress = ProgressDisplay()

    @property
    def images(self) -> Mapping[str, ImageList]:
        return self._plan.images

    def prepare(self) -> tuple[list[Evaluation], list[Task], str | None]:
        """The evaluations, their open chunks, and what is wrong with them, if anything."""
        try:
            self._plan = make_plan(self._config, on_gpu=bool(gpus_in_question(self._config.eval)))
            evaluations = self._plan.evaluations
            for number in range(len(evaluations)):
                self._open(number)
            tasks = [task for number in range(len(evaluations)) for task in self._to_do(number)]
        except UserError as error:
            return [], [], str(error)
        for note in self._plan.notes:
            print(f"warning: {note} (--model.add_normalization=1).", file=sys.stderr)
        for text in dict.fromkeys(f"{e.network}: {e.preprocessing}" for e in evaluations):
            print(text, file=sys.stderr)
        # All norms of a network chunk by chunk, so that they come to the same number of images.
        firsts = {self._group(number): number for number in reversed(range(len(evaluations)))}
        tasks.sort(key=lambda task: (firsts[self._group(task.evaluation)], task.chunk if self._config.eval.ci else 0))
        self._waiting = set(tasks)
        still = sum(len(evaluations[task.evaluation].positions(task.chunk)) for task in tasks)
        total = sum(evaluation.n for evaluation in evaluations)
        self.progress.start(images=(total - still, total), chunks=len(tasks))
        return evaluations, tasks, None

    def _group(self, number: int) -> tuple[str, int]:
        """Evaluations of the same images by the same network."""
        evaluation = self._plan.evaluations[number]
        return evaluation.network, evaluation.img_size

    def _chunks_enough(self, number: int) -> int | None:
        """How many first chunks of an evaluation are enough: all of them, without `eval.ci`; None where that is not known yet."""
        evaluation, points = self._plan.evaluations[number], self._config.eval.ci
        if points is None:
            return evaluation.chunks
        members = [other for other in range(len(self._plan.evaluations)) if self._group(other) == self._group(number)]
        records = [self._records[other] for other in members]
        all_done = all(len(some) == evaluation.chunks for some in records)
        return chunks_enough(records, points=points) or (evaluation.chunks if all_done else None)

    def _open(self, number: int) -> None:
        """Read what an earlier call has finished of an evaluation, and keep others out of its folder."""
        evaluation = self._plan.evaluations[number]
        state = self._states[number] = StateFolder(evaluation.folder)
        state.open(evaluation.identity)
        self._records[number] = {
            chunk: record
            for chunk, record in state.read(evaluation.chunks).items()
            # Images that are asked for now, and are not there, need the attacks again.
            if not self._config.eval.save_adv or self._has_images(state, record)
        }

    def _to_do(self, number: int) -> list[Task]:
        """The open chunks of one evaluation; its report, if it is finished."""
        evaluation, enough = self._plan.evaluations[number], self._chunks_enough(number)
        wanted = range(evaluation.chunks if enough is None else enough)
        tasks = [Task(number, chunk) for chunk in wanted if chunk not in self._records[number]]
        report = None if tasks or enough is None else _read_report(evaluation.folder)
        if report is not None and (report["chunks"], report["ci"]) == (enough, self._config.eval.ci):
            print(f"{evaluation}: finished before, skipped.", file=sys.stderr)
            self._reports[number] = report
            self._states.pop(number).close()
        return tasks

    @staticmethod
    def _has_images(state: StateFolder, record: Mapping[str, Any]) -> bool:
        return record["images_kept"] == len(record["positions"]) and state.images_file(record["chunk"]).exists()

    def receive(self, task: Task, record: dict[str, Any]) -> None:
        """Keep what a worker has finished."""
        self._waiting.discard(task)
        if task.evaluation in self._states:  # else it came too late: there are enough
            self._unsaved.append((task.evaluation, record))
            self._save()

    def collect(self) -> None:
        """Take in what other processes have finished, and write what could not be written before."""
        import evaluation.report  # noqa: F401  takes a second or two, while the workers are at work

        for message in self._board.messages():
            task, record = json.loads(message)
            self.receive(Task(*task), record)
        if self._tries.are_due():
            self._save()

    def is_done(self) -> bool:
        """Whether every report is written.

        Raises:
            UserError: the last chunk is finished, but the disk has taken nothing for a long time.
        """
        if not self._waiting and not self._tries.are_failing():
            self._save()
        if not self._waiting and self._tries.are_hopeless():
            raise UserError(
                f"eval.out: cannot write to {self._plan.root} ({self._tries.reason}); {len(self._unsaved)} chunks are lost."
            )
        return len(self._reports) == len(self._plan.evaluations)

    def _save(self) -> None:
        """Write records, and the reports of evaluations that are complete; what fails is kept and tried again."""
        try:
            while self._unsaved:
                number, record = self._unsaved[0]
                self._states[number].write(record)
                self._unsaved.pop(0)
                self._records[number][record["chunk"]] = record
                self.progress.chunk_done(self._plan.evaluations[number], self._records[number].values(), record)
            for number, enough in [(number, self._chunks_enough(number)) for number in self._states]:
                if enough is not None and all(chunk in self._records[number] for chunk in range(enough)):
                    self._report(number, enough)
            self._tries.succeeded()
        except OSError as error:
            if self._tries.failed(error):
                self.progress.say(
                    f"warning: eval.out: cannot write to {self._plan.root} ({error.strerror or error}); what is finished is kept "
                    f"in memory ({len(self._unsaved)} chunks) and tried again every {SAVE_AGAIN_SECONDS} seconds."
                )

    def _report(self, number: int, chunks: int) -> None:
        from evaluation.report import write_evaluation

        evaluation = self._plan.evaluations[number]
        records = [self._records[number][chunk] for chunk in range(chunks)]
        if not any(record["labels"] for record in records):
            raise UserError(f"data.val_dataset: none of the {evaluation.n} images of {evaluation} can be decoded.")
        images = self._plan.images[evaluation.network]
        examples = self._states[number].images_file(0)
        if points := self._config.eval.ci:
            known = chunks_enough([dict(enumerate(records))], points=points) is not None
            text = f"{sum(len(record['positions']) for record in records)} of {evaluation.n} images are enough"
            text = text if known else f"warning: all {evaluation.n} images are not enough"
            self.progress.say(f"{evaluation}: {text} for {points:g} points to each side.")
        self._reports[number] = write_evaluation(evaluation, records, images, self._config, examples)
        self._states.pop(number).close()
        self._board.skip(number)
        self._waiting = {task for task in self._waiting if task.evaluation != number}

    def finish(self) -> Outcome:
        """Table, summary and picture over all."""
        from evaluation.pictures import draw_accuracy
        from evaluation.report import comparison_text, curve, results_table, unions, warnings_of, write_json, write_text

        self.progress.close()
        evaluations, root = self._plan.evaluations, self._plan.root
        reports = [self._reports[number] for number in range(len(evaluations))]
        joint = unions(evaluations, reports)
        table = results_table(evaluations, reports, joint)
        with writable("eval.out", root):
            write_json(root / "summary.json", {"evaluations": reports, "unions": joint})
            write_text(root / "table.md", table + "\n")
            draw_accuracy(root / "accuracy.png", {str(e): curve(r) for e, r in zip(evaluations, reports)})
        print(table)
        for evaluation, report in zip(evaluations, reports):
            if text := comparison_text(report):
                print(text)
            for text in warnings_of(report, save_adv=self._config.eval.save_adv):
                print(f"warning: {evaluation}: {text}.", file=sys.stderr)
        print(f"reports: {root}")
        return Outcome(evaluations, reports, root)

    def close(self) -> None:
        """Leave the state folders to other runs."""
        self.progress.close()
        for state in self._states.values():
            state.close()


def _read_report(folder: Path) -> dict[str, Any] | None:
    """A finished evaluation's report; None where it has to be made (again)."""
    try:
        report = json.loads((folder / "report.json").read_bytes())
    except (OSError, ValueError):
        return None
    whole = isinstance(report, dict) and NEEDED <= report.keys() and (folder / "verdicts.csv").exists()
    return report if whole else None


class _Tries:
    """When to write again what could not be written."""

    def __init__(self) -> None:
        self.reason = ""
        self._since: float | None = None
        self._last = 0.0

    def failed(self, error: OSError) -> bool:
        """Note a failure; returns whether it is the first after a success."""
        first, now = self._since is None, time.monotonic()
        self.reason, self._last = error.strerror or str(error), now
        self._since = now if first else self._since
        return first

    def succeeded(self) -> None:
        self._since = None

    def are_failing(self) -> bool:
        return self._since is not None

    def are_due(self) -> bool:
        return self.are_failing() and time.monotonic() - self._last >= SAVE_AGAIN_SECONDS

    def are_hopeless(self) -> bool:
        return self.are_failing() and time.monotonic() - self._since >= GIVE_UP_SECONDS
