"""The run folder: params.json, log, weights, status.json, TensorBoard events, curves. Only the first process writes.

After the start, a failed write never ends a run: a full disk, a quota or a read-only folder gives a warning. Lines of the log and
events that cannot be written are lost; files of weights and training states are either complete or not there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from common.errors import cause_of
from common.files import set_aside, writable, write_atomically
from common.flags import config_to_dict
from common.provenance import PROVENANCE_KEY
from training.config import TrainConfig
from training.console import warn
from training.curves import draw_curves
from training.status import STATUS, read_log, write_status

WEIGHTS_NAMES = {"raw": "weights", "ema": "weights_ema"}  # kind of network → prefix of its file names


class NoRunFolder:
    """Run folder of the processes that write nothing."""

    path = set_aside = None

    def log_start(self, record: Mapping[str, Any]) -> None: ...
    def log_steps(self, records: list[dict[str, Any]]) -> None: ...
    def log_epoch(self, record: Mapping[str, Any]) -> None: ...
    def save_best(self, networks: Mapping[str, nn.Module]) -> None: ...
    def set_status(self, status: str, *, step: int, epoch: int, reason: str = "") -> None: ...
    def close(self) -> None: ...
    def save_weights(self, networks: Mapping[str, nn.Module], epoch: int) -> bool:
        return True

    def position(self) -> dict[str, Any]:
        return {}


class RunFolder(NoRunFolder):
    """All files of a run.

    `log` contains one JSON object per line. Its `kind` is "start" (of the run, or of a process that resumes it), "step" (depends
    on `logging.log_level`) or "epoch" (of a validation). Non-finite numbers are strings, because JSON does not have them.

    Args:
        provenance: of this start; with `resume` it also contains `step`.
        resume: None starts from scratch: the folder of an earlier run of the same name is renamed, never overwritten. Otherwise
            the return value of `position()` when the training state was saved, with the state's `step`: the run resumes in its
            folder, and its log is truncated to that position.

    Attributes:
        set_aside: the new name of the earlier run's folder, None if there was none.

    Raises:
        UserError: the folder or a file in it cannot be created or opened.
    """

    def __init__(
        self, path: Path, config: TrainConfig, provenance: Mapping[str, Any], *, resume: Mapping[str, Any] | None = None
    ) -> None:
        self.path = path
        self._keep, self._level = config.logging.keep, config.logging.log_level
        self._reported: set[str] = set()  # files whose failure was reported
        self._saved: dict[str, list[int]] = {name: [] for name in WEIGHTS_NAMES.values()}
        with writable("logging.folder", self.path):
            self.set_aside = set_aside(self.path) if resume is None else None
            self.path.mkdir(parents=True, exist_ok=True)
            if resume is not None:
                for unfinished in self.path.glob(".*.part"):  # of a process that was killed during a write
                    unfinished.unlink()
                self._cut_log(resume["log_bytes"], resume.get("log_lines", []))
                for name, epochs in resume["saved"].items():
                    self._saved[name] = [epoch for epoch in epochs if (self.path / f"{name}_{epoch}.pt").exists()]
                provenance = self._with_earlier_starts(provenance)
            self._write_params(config, provenance)
            self._log = open(self.path / "log", "ab", buffering=0)
        self._events: SummaryWriter | None = None
        self._write_events(lambda: self._open_events(config, resume))

    def log_start(self, record: Mapping[str, Any]) -> None:
        """Log the start of the run, or of a process that resumes it."""
        self._append({"kind": "start", **record})

    def log_steps(self, records: list[dict[str, Any]]) -> None:
        """Log the part of the steps' records that `logging.log_level` selects; skipped steps are always logged."""
        for record in records:
            skipped = "skipped" in record
            if not (self._level or skipped or "attack" in record):
                continue
            shown = {"epoch", "step", "attack", "skipped"} if self._level == 0 else record.keys() - {"loss"}
            shown |= {"loss"} if self._level > 1 or skipped else set()
            self._write({"kind": "step"} | {key: value for key, value in record.items() if key in shown})

    def log_epoch(self, record: Mapping[str, Any]) -> None:
        """Log the numbers of an epoch and its validation."""
        self._write({"kind": "epoch", **record})

    def position(self) -> dict[str, Any]:
        """Return the position of the run for the training state: bytes of the log on the disk, and epochs of the weights."""
        with suppress(OSError):
            os.fsync(self._log.fileno())
        self._write_events(lambda: self._events.flush())
        return {
            "log_bytes": os.fstat(self._log.fileno()).st_size,
            "saved": {name: list(epochs) for name, epochs in self._saved.items()},
        }

    def save_weights(self, networks: Mapping[str, nn.Module], epoch: int) -> bool:
        """Write weights_<epoch>.pt and weights_ema_<epoch>.pt; delete the oldest beyond `logging.keep`.

        If the new file cannot be written, none is deleted. Return whether all files were written.
        """
        complete = True
        for kind, network in networks.items():
            name = WEIGHTS_NAMES[kind]
            if self._save(network, self.path / f"{name}_{epoch}.pt"):
                self._saved[name] = [e for e in self._saved[name] if e != epoch] + [epoch]
                self._delete_old(name)
            else:
                complete = False
        return complete

    def save_best(self, networks: Mapping[str, nn.Module]) -> None:
        """Write weights_best.pt and weights_ema_best.pt, replacing the earlier ones."""
        for kind, network in networks.items():
            self._save(network, self.path / f"{WEIGHTS_NAMES[kind]}_best.pt")

    def set_status(self, status: str, *, step: int, epoch: int, reason: str = "") -> None:
        """Write status.json: the run's status, with optimiser steps and finished epochs of the newest state on the disk."""
        try:
            write_status(self.path, {"status": status, "step": step, "epoch": epoch, "reason": reason})
        except OSError as error:
            self._warn_unwritten(self.path / STATUS, error, f'the status is "{status}"')

    def close(self) -> None:
        """Close the files and draw the curves."""
        self._log.close()
        self._write_events(lambda: self._events.close())
        try:
            draw_curves(self.path / "log", self.path / "curves.png")
        except Exception as error:  # any error of the plotting library: a missing plot must not end a run
            self._warn_unwritten(self.path / "curves.png", error, "there are no new curves")

    def _open_events(self, config: TrainConfig, resume: Mapping[str, Any] | None) -> None:
        self._events = SummaryWriter(str(self.path), purge_step=resume["step"] if resume is not None else None)
        if resume is None:
            if config.misc.notes:
                self._events.add_text("notes", config.misc.notes, 0)
            return
        # purge_step also hides the events of the state's own step. Add them again from the log.
        for kind in ("step", "epoch"):
            for record in read_log(self.path / "log", kind):
                if record["step"] >= resume["step"]:
                    self._add_numbers(record | {"kind": kind})

    def _write(self, record: dict[str, Any]) -> None:
        self._append(record)
        self._write_events(lambda: self._add_numbers(record))

    def _add_numbers(self, record: dict[str, Any]) -> None:
        for key, value in record.items():
            if isinstance(value, (int, float)) and key not in ("step", "epoch"):
                self._events.add_scalar(f"{record['kind']}/{key}", value, record["step"])

    def _append(self, record: dict[str, Any]) -> None:
        # JSON has no non-finite numbers, so they become strings.
        plain = json.loads(json.dumps(record), parse_constant=lambda name: str(float(name)))
        line = (json.dumps(plain) + "\n").encode()
        size = os.fstat(self._log.fileno()).st_size
        try:
            if self._log.write(line) < len(line):
                raise OSError(None, "the disk is full")
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._log.fileno(), size)  # leave no partial line
            self._warn_once(self.path / "log", error)

    def _write_events(self, write: Callable[[], None]) -> None:
        if "events" not in self._reported:
            try:
                write()
            except Exception as error:  # of any type: it comes from the writer's thread, which has ended
                self._warn_once(self.path / "events", error)

    def _write_params(self, config: TrainConfig, provenance: Mapping[str, Any]) -> None:
        params = config_to_dict(config) | {PROVENANCE_KEY: dict(provenance)}
        try:
            write_atomically(self.path / "params.json", lambda file: file.write(json.dumps(params, indent=2).encode()))
        except OSError as error:
            if not (self.path / "params.json").exists():
                raise
            self._warn_unwritten(self.path / "params.json", error, "it does not record this start")

    def _with_earlier_starts(self, provenance: Mapping[str, Any]) -> dict[str, Any]:
        """Return the provenance of the first start, with this start added to its `resumed`."""
        path = self.path / "params.json"
        try:
            first = json.loads(path.read_text())[PROVENANCE_KEY]
            return first | {"resumed": [*first.get("resumed", []), dict(provenance)]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warn(f"{path}: cannot be read ({cause_of(error)}); the record of the run's first start is lost.")
            return dict(provenance) | {"resumed": [dict(provenance)]}

    def _cut_log(self, size: int, lines: list[str]) -> None:
        """Keep the complete lines in the log's first `size` bytes; add `lines`, kept in the state by earlier versions."""
        path = self.path / "log"
        content = path.read_bytes()[:size] if path.exists() else b""
        kept = content[: content.rfind(b"\n") + 1]
        if len(kept) < size:
            warn(
                f"{path}: only {len(kept)} of the {size} bytes at the time of the saved state are there; the rest is lost."
            )
        with open(path, "ab") as file:
            file.truncate(len(kept))
            file.write("".join(line.rstrip("\n") + "\n" for line in lines).encode())

    def _save(self, network: nn.Module, path: Path) -> bool:
        """Write the weights; on failure warn and return False."""
        state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
        try:
            write_atomically(path, lambda file: torch.save(state, file))
        except (OSError, RuntimeError) as error:  # torch.save reports some file errors as RuntimeError
            self._warn_unwritten(path, error, "the weights saved before are unchanged")
            return False
        return True

    def _delete_old(self, name: str) -> None:
        saved = self._saved[name]
        while self._keep and len(saved) > self._keep:
            path = self.path / f"{name}_{saved[0]}.pt"
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                warn(f"{path}: cannot be deleted ({cause_of(error)}).")
                return
            saved.pop(0)

    def _warn_once(self, path: Path, error: Exception) -> None:
        if path.name not in self._reported:
            self._reported.add(path.name)
            self._warn_unwritten(path, error, "training continues, but its records are lost")

    def _warn_unwritten(self, path: Path, error: Exception, consequence: str) -> None:
        warn(f"{path}: cannot be written ({cause_of(error)}); {consequence}.")
