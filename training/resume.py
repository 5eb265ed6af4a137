"""Start of a run: from scratch, or from a training state that fits its flags."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import UserError, blame
from common.files import take_folder, writable
from common.processes import Processes
from common.provenance import PROVENANCE_KEY
from data.source import facts_of
from training.build import open_sources
from training.checkpoint import LAST, PREVIOUS, DamagedState, newest_state, read_state
from training.config import TrainConfig
from training.identity import changed_flags, find_folder, other_images, shorter_run
from training.progress import Progress
from training.schedule import lr_at
from training.state import TrainState
from training.status import is_finished, mark_status

STATE_FORMAT = 1  # of a training state; changes when an older state cannot be read any more
# Keys of a training state; see `Trainer`.
STATE_KEYS = {"format", "step", "train", "config", "run", "progress", "log"}
EPOCHS = "training.epochs: "  # prefix in `changed_flags` if that flag has changed
STOP_FILE = "stop"  # file in the run folder that asks for a stop
PATIENCE = 15.0  # seconds to wait for a run that is ending to leave its folder


@dataclass
class Start:
    """Where and how a run starts.

    Attributes:
        state: the training state to resume from; None: from scratch.
        source: the file of this state.
        own: the state belongs to this run, which continues in its folder.
        finished: the run is already finished; there is nothing to do.
        origin: `training.resume` of a run that started from another run's state; empty if it started from scratch.
        notes: sentences for the user.
        lock: keeps other runs out of the run folder, if the folder exists; on the first process only.
        folder: the run's folder; on the first process only, like `origin` and `notes`.
    """

    state: dict[str, Any] | None = None
    source: Path | None = None
    own: bool = False
    finished: bool = False
    origin: str = ""
    notes: list[str] = field(default_factory=list)
    lock: BinaryIO | None = None
    folder: Path | None = None

    def hand_over(self) -> dict[str, Any] | None:
        """Return the training state once and drop it here: it is as large as model, EMA and optimiser together."""
        state, self.state = self.state, None
        return state

    def hold(self) -> None:
        """Create the run folder if needed and lock it against other runs; no effect if it is locked already."""
        if self.lock is None:
            with writable("logging.folder", self.folder), blame("logging.folder"):
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock = take_folder(self.folder)

    def release(self) -> None:
        """Unlock the folder for other runs."""
        if self.lock is not None:
            self.lock.close()
            self.lock = None


def begin(config: TrainConfig, processes: Processes) -> Start:
    """Return where the run starts, the same on all processes, and lock its folder against other runs.

    Only the first process reads files, so the others do not need its disk.

    Raises:
        UserError: as `find_start`, or another run uses the folder.
    """
    start = processes.on_first(lambda: _take(config)) or Start()
    shared = processes.broadcast((start.state, start.source, start.own, start.finished))
    return start if processes.is_first else Start(*shared)


def _take(config: TrainConfig) -> Start:
    folder, note = find_folder(config)
    lock = None
    if folder.is_dir():
        with writable("logging.folder", folder), blame("logging.folder"):
            lock = take_folder(folder, patience=PATIENCE)
            (folder / STOP_FILE).unlink(missing_ok=True)  # meant for an earlier run
    try:
        start = find_start(config, folder, note)
    except UserError as error:
        if lock is not None:
            if config.training.resume == "auto" and not is_finished(folder):
                mark_status(folder, "failed", str(error))
            lock.close()
        raise
    start.lock = lock
    if start.own and not start.finished:
        mark_status(folder, "running")
    return start


def find_start(config: TrainConfig, folder: Path, note: str) -> Start:
    """Return what `training.resume` means for the run of `folder`; only reads. `folder`, `note`: of `find_folder`.

    Raises:
        UserError: the requested state is missing, no state is complete, or flags that change the results differ.
    """
    start = _find_start(config, folder)
    start.folder = folder
    if not start.finished:
        start.notes[:0] = [note] if note else []
        if start.state is None and config.training.resume == "auto" and not config.training.eval_only:
            start.notes += _how_to_extend(config)
    return start


def _find_start(config: TrainConfig, folder: Path) -> Start:
    asked = config.training.resume
    if asked == "none" or config.training.eval_only:
        return Start()
    if asked == "auto":
        return _own_start(config, folder)
    found = _newest(folder)
    if found is not None and found[0]["run"]["origin"] == asked.rstrip("/"):  # the same command was given again
        return _own_start(config, folder)
    path = Path(asked)
    found = _newest(path) if path.is_dir() else (_read(path), path, [])
    if found is None:
        raise UserError(f"training.resume: expected a run folder with {LAST} or a state file, got {path}.")
    state, source, notes = found
    changed = changed_flags(state["config"], config, global_batch=state["run"]["global_batch"])
    epochs = state["config"]["training"]["epochs"]
    longer = config.training.epochs > epochs  # then a changed training.epochs is intended
    if [flag for flag in changed if not (longer and flag.startswith(EPOCHS))] and not config.training.resume_force:
        raise UserError(
            f"training.resume: flags that change the results differ from those of {source}: {'; '.join(changed)}. Give the "
            "old values, or --training.resume_force=1 to resume with the new ones."
        )
    notes += [f"resuming with changed flags: {'; '.join(changed)}"] if changed else []
    if longer:
        notes.append(_learning_rates(config, state["step"] / state["run"]["steps_per_epoch"], epochs))
    own = folder.exists() and source.parent.resolve() == folder.resolve()
    _check_epochs(state, source, config, own=own)
    origin = state["run"]["origin"] if own else asked.rstrip("/")
    return Start(state, source, own, own and is_finished(folder), origin, notes)


def _how_to_extend(config: TrainConfig) -> list[str]:
    """Return a note if a run with the same flags but fewer epochs exists."""
    if (found := shorter_run(config)) is None:
        return []
    folder, epochs, done = found
    return [
        f"{folder} contains this run with training.epochs={epochs}, {done} of them done, but this run starts at epoch 0; to "
        f"resume from there give --training.resume={folder}: {_learning_rates(config, done, epochs)}"
    ]


def _learning_rates(config: TrainConfig, progress: float, epochs: int) -> str:
    """Describe how the learning rate changes if a run of `epochs` resumes with more epochs; `progress` in epochs."""
    before, now = (lr_at(min(progress, e), lr=config.lr, epochs=e) for e in (epochs, config.training.epochs))
    return (
        f"the learning rate resumes at {now:.3g}, the value in the schedule of {config.training.epochs} epochs; in the schedule "
        f"of {epochs} epochs it was {before:.3g}"
    )


def _check_epochs(state: Mapping[str, Any], source: Path, config: TrainConfig, *, own: bool) -> None:
    epochs, done = config.training.epochs, state["run"]["epochs_done"]
    if epochs < done or (epochs == done and not own):
        raise UserError(
            f"training.epochs: {source} has already done {done} epochs, expected more than that, got {epochs}."
        )


def _own_start(config: TrainConfig, folder: Path) -> Start:
    if is_finished(folder):
        return _finished_start(config, folder)
    found = _newest(folder)
    if found is None:
        return Start()
    state, source, notes = found
    changed = changed_flags(state["config"], config, global_batch=state["run"]["global_batch"])
    if changed and not config.training.resume_force:
        return Start(notes=[*notes, f"{source} has other flags ({'; '.join(changed)}); this run starts from scratch"])
    _check_epochs(state, source, config, own=True)
    return Start(state, source, True, False, state["run"]["origin"], notes)


def _finished_start(config: TrainConfig, folder: Path) -> Start:
    """Return the start for a finished run: there is nothing to do, unless flags that change the results differ.

    Raises:
        UserError: it was trained on other images than those of `data.train_dataset`, which are opened if that flag has changed.
    """
    finished = Start(own=True, finished=True)
    try:
        params = json.loads((folder / "params.json").read_text())
        before, provenance = params["data"]["train_dataset"], params[PROVENANCE_KEY]
        changed = changed_flags(params, config, global_batch=provenance["global_batch"])
        finished.origin = provenance.get("origin", "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return finished  # damaged
    if changed:
        return Start(
            notes=[f"{folder} is finished with other flags ({'; '.join(changed)}); this run starts from scratch"]
        )
    if os.path.normpath(before) == os.path.normpath(config.data.train_dataset):
        return finished
    source, _ = open_sources(dataclasses.replace(config, data=dataclasses.replace(config.data, in_memory=False)))
    differences = other_images(provenance, facts_of(source))
    if differences:
        raise UserError(
            f"logging.folder: {folder} contains this run, finished, but {'; '.join(differences)}. Give --logging.addendum=… for "
            "a second run, or --training.resume=none to train this run from scratch."
        )
    return finished


def _newest(folder: Path) -> tuple[dict[str, Any], Path, list[str]] | None:
    found = newest_state(folder)
    if found is not None:
        _check_keys(found[0], found[1])
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        state = read_state(path)
    except DamagedState as error:
        raise UserError(f"training.resume: {error}") from error
    except OSError as error:
        raise UserError(
            f"training.resume: expected auto, none, a run folder or a state file ({LAST}, {PREVIOUS}), got {path} "
            f"({error.strerror or error})."
        ) from error
    _check_keys(state, path)
    return state


def _check_keys(state: Mapping[str, Any], source: Path) -> None:
    if missing := STATE_KEYS - state.keys():
        raise UserError(
            f"training.resume: {source} is not a training state (it lacks {', '.join(sorted(missing))}); expected {LAST} or "
            f"{PREVIOUS} of a run folder. Give a file of weights as --model.ckpt_path."
        )
    if state["format"] != STATE_FORMAT:
        raise UserError(
            f"training.resume: {source} has format {state['format']}, expected {STATE_FORMAT}: another version wrote it. "
            "Use that version, or start from the run's weights (--model.ckpt_path) with --training.resume=none."
        )


def accumulation(state: Mapping[str, Any], config: TrainConfig, world_size: int) -> int:
    """Return the `training.grad_accum` that keeps the global batch of a training state on `world_size` processes.

    Raises:
        UserError: the global batch is not divisible.
    """
    training, run, flags = config.training, state["run"], state["config"]["training"]
    changed = any(getattr(training, name) != flags[name] for name in ("batch_size", "grad_accum"))
    if changed or training.batch_size * training.grad_accum * world_size == run["global_batch"]:
        return training.grad_accum  # changed with resume_force, or another split of the same global batch
    together = training.batch_size * world_size
    accum, rest = divmod(run["global_batch"], together)
    if rest:
        raise UserError(
            f"training.resume: a step of this run takes {run['global_batch']} images ({training.batch_size} × "
            f"{run['grad_accum']} micro-batches × {run['world_size']} processes), which {world_size} processes cannot share: "
            f"together they process {together} images at once. Expected a number of processes that divides "
            f"{run['global_batch'] // training.batch_size}."
        )
    return accum


def check_run(
    run: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    config: TrainConfig,
    any_workers: bool,
    on_cpu: bool,
) -> list[str]:
    """Check the data and processes of a training state (`run`) against those of this start (`now`).

    Args:
        any_workers: whether the loader's order is the same for any number of readers.
        on_cpu: whether the number of threads matters.

    Returns:
        Sentences for the user.

    Raises:
        UserError: they differ, without `training.resume_force`.
    """
    notes, differences = [], other_images(run, now)
    if not any_workers and run["readers"] != now["readers"]:
        (processes, workers), (before, workers_before) = now["readers"], run["readers"]
        differences.append(
            f"a stream is read by {processes} processes with {workers} loader workers each, but was read by {before} with "
            f"{workers_before} before, so the order of images differs"
        )
    if differences and not config.training.resume_force:
        raise UserError(
            f"training.resume: {'; '.join(differences)}. Restore what was there, or give --training.resume_force=1 to resume "
            "anyway, or --training.resume=none to start from scratch."
        )
    if run["threads"] != now["threads"] and on_cpu:
        notes.append(
            f"a process has {now['threads']} threads, but had {run['threads']} before: the last digits may differ from those of "
            "an uninterrupted run (OMP_NUM_THREADS)"
        )
    return notes + differences


def restore(saved: Mapping[str, Any], state: TrainState, *, steps_per_epoch: int, source: Path) -> Progress:
    """Load a training state into `state`, and return the progress of the run.

    Raises:
        UserError: the state does not fit the network or optimiser.
    """
    try:
        state.load_state_dict(saved["train"])
        progress = Progress(**saved["progress"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"training.resume: {source} does not fit the model: {error}") from error
    before = saved["run"]["steps_per_epoch"]
    if before != steps_per_epoch:  # with resume_force: resume at the same share of the run
        state.step = round(state.step / before * steps_per_epoch)
    return progress
