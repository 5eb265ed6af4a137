"""Where a run begins: anew, or at a training state that fits its flags."""

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

STATE_FORMAT = 1  # of a training state; changes when an older one cannot be read any more
# What a training state holds; see `Trainer`.
STATE_KEYS = {"format", "step", "train", "config", "run", "progress", "log"}
EPOCHS = "training.epochs: "  # how `changed_flags` begins where that flag has changed
STOP_FILE = "stop"  # file in the run folder that asks for a stop
PATIENCE = 15.0  # seconds that a run which is ending has to leave its folder


@dataclass
class Start:
    """Where a run begins.

    Attributes:
        state: the training state to go on from; None: anew.
        source: the file it comes from.
        own: it is this run's own, whose folder goes on.
        finished: the run has come to its end already; there is nothing to do.
        origin: what the run began at, where that is another run's state (`training.resume` then); empty where it began anew.
        notes: sentences for the user.
        lock: keeps other runs out of the run folder, where there is one; on the first process.
        folder: the run's folder; on the first process, as are `origin` and `notes`.
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
        """The training state, once: it is as large as model, EMA and optimiser together, and nothing shall keep it here."""
        state, self.state = self.state, None
        return state

    def hold(self) -> None:
        """Keep other runs out of the run folder, which is made where there is none; without effect where that is so already."""
        if self.lock is None:
            with writable("logging.folder", self.folder), blame("logging.folder"):
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock = take_folder(self.folder)

    def release(self) -> None:
        """Let other runs into the folder."""
        if self.lock is not None:
            self.lock.close()
            self.lock = None


def begin(config: TrainConfig, processes: Processes) -> Start:
    """Where the run begins, the same on all processes; keeps other runs out of its folder.

    Only the first process reads, so the others need not see its disk.

    Raises:
        UserError: as `find_start`, or another run is working in the folder.
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
            (folder / STOP_FILE).unlink(missing_ok=True)  # meant for a run before this one
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
    """What `training.resume` means for the run whose folder `find_folder` found, with a sentence on it; only reads.

    Raises:
        UserError: no state where one was asked for, none that is whole, or flags that alter the numbers have changed.
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
    if found is not None and found[0]["run"]["origin"] == asked.rstrip("/"):  # the same command once more
        return _own_start(config, folder)
    path = Path(asked)
    found = _newest(path) if path.is_dir() else (_read(path), path, [])
    if found is None:
        raise UserError(f"training.resume: expected a run folder with {LAST} or a state file, got {path}.")
    state, source, notes = found
    changed = changed_flags(state["config"], config, global_batch=state["run"]["global_batch"])
    epochs = state["config"]["training"]["epochs"]
    longer = config.training.epochs > epochs  # which is what this flag was given for
    if [flag for flag in changed if not (longer and flag.startswith(EPOCHS))] and not config.training.resume_force:
        raise UserError(
            f"training.resume: flags that alter the numbers are not those of {source}: {'; '.join(changed)}. Give them as they "
            "were, or --training.resume_force=1 to go on with the new ones."
        )
    notes += [f"going on with changed flags: {'; '.join(changed)}"] if changed else []
    if longer:
        notes.append(_learning_rates(config, state["step"] / state["run"]["steps_per_epoch"], epochs))
    own = folder.exists() and source.parent.resolve() == folder.resolve()
    _check_epochs(state, source, config, own=own)
    origin = state["run"]["origin"] if own else asked.rstrip("/")
    return Start(state, source, own, own and is_finished(folder), origin, notes)


def _how_to_extend(config: TrainConfig) -> list[str]:
    """A sentence where a run of these flags has been trained for fewer epochs."""
    if (found := shorter_run(config)) is None:
        return []
    folder, epochs, done = found
    return [
        f"{folder} holds this run with training.epochs={epochs}, {done} of them done, and this one begins at epoch 0; to go on "
        f"from there give --training.resume={folder}: {_learning_rates(config, done, epochs)}"
    ]


def _learning_rates(config: TrainConfig, progress: float, epochs: int) -> str:
    """What going on for more epochs does to the learning rate; `progress` in epochs, of a run of `epochs`."""
    before, now = (lr_at(min(progress, e), lr=config.lr, epochs=e) for e in (epochs, config.training.epochs))
    return (
        f"the learning rate goes on at {now:.3g}, where the schedule of {config.training.epochs} epochs has it; that of {epochs} "
        f"had come to {before:.3g}"
    )


def _check_epochs(state: Mapping[str, Any], source: Path, config: TrainConfig, *, own: bool) -> None:
    epochs, done = config.training.epochs, state["run"]["epochs_done"]
    if epochs < done or (epochs == done and not own):
        raise UserError(
            f"training.epochs: {source} has {done} epochs behind it, expected more than that, got {epochs}."
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
        return Start(notes=[*notes, f"{source} is of other flags ({'; '.join(changed)}), so this run starts anew"])
    _check_epochs(state, source, config, own=True)
    return Start(state, source, True, False, state["run"]["origin"], notes)


def _finished_start(config: TrainConfig, folder: Path) -> Start:
    """Where the run of the folder is finished: nothing to do, unless that was with other flags that alter the numbers.

    Raises:
        UserError: it was finished on other images than those of `data.train_dataset`, which are opened if that has changed.
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
        return Start(notes=[f"{folder} is finished with other flags ({'; '.join(changed)}), so this run starts anew"])
    if os.path.normpath(before) == os.path.normpath(config.data.train_dataset):
        return finished
    source, _ = open_sources(dataclasses.replace(config, data=dataclasses.replace(config.data, in_memory=False)))
    differences = other_images(provenance, facts_of(source))
    if differences:
        raise UserError(
            f"logging.folder: {folder} holds this run, finished, and {'; '.join(differences)}. Give --logging.addendum=… for a "
            "second run, or --training.resume=none to train this one from scratch."
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
            f"training.resume: {source} is no training state (it lacks {', '.join(sorted(missing))}); expected {LAST} or "
            f"{PREVIOUS} of a run folder. Weights alone go to --model.ckpt_path."
        )
    if state["format"] != STATE_FORMAT:
        raise UserError(
            f"training.resume: {source} has format {state['format']}, expected {STATE_FORMAT}: another version wrote it. "
            "Go on with that version, or from the run's weights (--model.ckpt_path) with --training.resume=none."
        )


def accumulation(state: Mapping[str, Any], config: TrainConfig, world_size: int) -> int:
    """`training.grad_accum` that keeps the global batch of a training state on `world_size` processes.

    Raises:
        UserError: it does not divide.
    """
    training, run, flags = config.training, state["run"], state["config"]["training"]
    changed = any(getattr(training, name) != flags[name] for name in ("batch_size", "grad_accum"))
    if changed or training.batch_size * training.grad_accum * world_size == run["global_batch"]:
        return training.grad_accum  # changed by force, or another share of the same
    together = training.batch_size * world_size
    accum, rest = divmod(run["global_batch"], together)
    if rest:
        raise UserError(
            f"training.resume: a step of this run takes {run['global_batch']} images ({training.batch_size} × "
            f"{run['grad_accum']} micro-batches × {run['world_size']} processes), which {world_size} processes cannot share: "
            f"they take {together} at once. Expected a number of processes that divides "
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
    """Check the data and processes of a training state, its `run`, against this start's, `now`.

    Args:
        any_workers: whether the loader's order is the same for any number of readers.
        on_cpu: whether the number of threads counts.

    Returns:
        Sentences for the user.

    Raises:
        UserError: they differ, without `training.resume_force`.
    """
    notes, differences = [], other_images(run, now)
    if not any_workers and run["readers"] != now["readers"]:
        (processes, workers), (before, workers_before) = now["readers"], run["readers"]
        differences.append(
            f"a stream is read by {processes} processes with {workers} loader workers each, it was by {before} with "
            f"{workers_before}, which makes another order"
        )
    if differences and not config.training.resume_force:
        raise UserError(
            f"training.resume: {'; '.join(differences)}. Put back what was there, give --training.resume_force=1 to go on "
            "all the same, or --training.resume=none to start anew."
        )
    if run["threads"] != now["threads"] and on_cpu:
        notes.append(
            f"a process has {now['threads']} threads, it had {run['threads']}: the last digits may differ from an undisturbed "
            "run's (OMP_NUM_THREADS)"
        )
    return notes + differences


def restore(saved: Mapping[str, Any], state: TrainState, *, steps_per_epoch: int, source: Path) -> Progress:
    """Take a training state over into `state`; returns where the run is.

    Raises:
        UserError: it does not fit the network or optimiser.
    """
    try:
        state.load_state_dict(saved["train"])
        progress = Progress(**saved["progress"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"training.resume: {source} does not fit the model: {error}") from error
    before = saved["run"]["steps_per_epoch"]
    if before != steps_per_epoch:  # by force: resumes at the same share of the run
        state.step = round(state.step / before * steps_per_epoch)
    return progress
