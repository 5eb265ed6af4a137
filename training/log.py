"""The run folder: params.json, log, weights, status, TensorBoard events, curves. Only the first process writes.

Once a run has started, no failure to write ends it: a full disk, a quota or a folder that became read-only is a warning.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import nn
from torch.utils.tensorboard.summary import text

from common.files import set_aside, writable, write_atomically
from common.flags import config_to_dict
from common.provenance import PROVENANCE_KEY
from training.config import TrainConfig
from training.curves import draw_curves

STATUS = "status.json"
WARN_SECONDS = 60.0  # between two warnings that log or events cannot be written
WEIGHTS = {"raw": "weights", "ema": "weights_ema"}  # kind of network → beginning of its files' names


class RunFolder:
    """Everything a run leaves behind, in `<logging.folder>/<run name>`.

    `log` holds one JSON object a line: records with `step` (per step, by `logging.log_level`) and records with `top1` (per
    validation). Non-finite numbers are written as strings, which JSON has no numbers for.

    Args:
        config: all flags.
        provenance: of this start; with `resume` it holds the `step` too.
        warn: takes one sentence for the user.
        resume: None starts afresh: a folder of an earlier run of the same name is renamed, never overwritten. Else what
            `position()` returned when the training state was saved, with the state's `step`: the run goes on in its folder,
            whose log is cut to that position.

    Attributes:
        path: the folder.
        set_aside: the new name of the earlier run's folder, None where there was none.

    Raises:
        UserError: the folder or a file in it cannot be created or opened.
    """

    def __init__(
        self,
        config: TrainConfig,
        provenance: Mapping[str, Any],
        *,
        warn: Callable[[str], None],
        resume: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(config.logging.folder) / config.run_name
        self.keep = config.logging.keep
        self.set_aside: Path | None = None
        self._warn, self._warned_at = warn, -math.inf
        self._saved: dict[str, list[int]] = {name: [] for name in WEIGHTS.values()}
        with writable("logging.folder", self.path):
            if resume is None:
                self._start(config, provenance)
            else:
                self._continue(config, provenance, resume)
        if config.misc.notes and not (resume and resume["step"]):
            self._events.append(_event(text("notes", config.misc.notes), step=0))

    def _start(self, config: TrainConfig, provenance: Mapping[str, Any]) -> None:
        self.set_aside = set_aside(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._write_params(config, provenance)
        self._log = AppendedFile(self.path / "log", on_failure=self._note_failure)
        self._events = self._open_events(purge_step=None)

    def _continue(self, config: TrainConfig, provenance: Mapping[str, Any], resume: Mapping[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        for unfinished in self.path.glob(".*.part"):  # of a process that was killed while it wrote
            unfinished.unlink()
        kept = self._kept_log(resume["log_bytes"])
        waiting = [line.encode() for line in resume["log_lines"]]
        self._log = AppendedFile(self.path / "log", on_failure=self._note_failure, size=len(kept))
        for line in waiting:
            self._log.append(line)
        for name, epochs in resume["saved"].items():
            self._saved[name] = [epoch for epoch in epochs if (self.path / f"{name}_{epoch}.pt").exists()]
        # The state's own step may have been validated after the state was saved, and the events of waiting lines may be lost
        # too: everything from there on is hidden, and shown again from the log.
        first = min([resume["step"], *(json.loads(line).get("step", 0) for line in waiting)])
        self._events = self._open_events(purge_step=first)
        for record in _records_from(kept.splitlines() + waiting, step=first):
            self._add_events(record)
        try:
            self._write_params(config, self._with_earlier_starts(provenance))
        except OSError as error:
            self._warn_unwritten(self.path / "params.json", error, "it does not name this start")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line to the log, and its numbers to the TensorBoard events; what cannot be written now is written later."""
        self._log.append((json.dumps(_plain(dict(record)), allow_nan=False) + "\n").encode())
        self._add_events(record)

    def position(self) -> dict[str, Any]:
        """Where the run stands, for the training state: plain values that JSON and `torch.load(weights_only=True)` take.

        Afterwards all that was logged is on the disk (`log_bytes` of the log), or in the result (`log_lines`, which the disk did
        not take). `saved` holds the epochs of the weights files.
        """
        self._log.sync()
        self._events.sync()
        return {
            "log_bytes": self._log.synced,
            "log_lines": [line.decode() for line in self._log.waiting],
            "saved": {name: list(epochs) for name, epochs in self._saved.items()},
        }

    def save_weights(self, networks: Mapping[str, nn.Module], epoch: int) -> bool:
        """Write weights_<epoch>.pt and weights_ema_<epoch>.pt; delete the oldest beyond `logging.keep`.

        Where the new file cannot be written, none is deleted. Returns whether all were written.
        """
        complete = True
        for kind, network in networks.items():
            name = WEIGHTS[kind]
            if self._save(network, self.path / f"{name}_{epoch}.pt"):
                self._saved[name] = [e for e in self._saved[name] if e != epoch] + [epoch]
                self._delete_old(name)
            else:
                complete = False
        return complete

    def save_best(self, networks: Mapping[str, nn.Module]) -> None:
        """Write weights_best.pt and weights_ema_best.pt over those before."""
        for kind, network in networks.items():
            self._save(network, self.path / f"{WEIGHTS[kind]}_best.pt")

    def set_status(self, status: str, *, step: int, epoch: int, reason: str = "") -> None:
        """Write status.json: how the run stands, with optimiser steps and finished epochs of the newest state on the disk."""
        try:
            _write_status(self.path, {"status": status, "step": step, "epoch": epoch, "reason": reason})
        except OSError as error:
            self._warn_unwritten(self.path / STATUS, error, f'the status is "{status}"')

    def close(self) -> None:
        """Write what waits and draw the curves."""
        for file in (self._log, self._events):
            file.close()
            if file.waiting:
                self._warn(f"{file.path}: the last {len(file.waiting)} records could not be written.")
        try:
            draw_curves(self.path / "log", self.path / "curves.png")
        except Exception as error:  # whatever the drawing library meets: a picture is not worth the end of a run
            self._warn_unwritten(self.path / "curves.png", error, "there are no new curves")

    def _write_params(self, config: TrainConfig, provenance: Mapping[str, Any]) -> None:
        params = config_to_dict(config) | {PROVENANCE_KEY: dict(provenance)}
        write_atomically(self.path / "params.json", lambda file: file.write(json.dumps(params, indent=2).encode()))

    def _with_earlier_starts(self, provenance: Mapping[str, Any]) -> dict[str, Any]:
        """Provenance of the first start, with this one added to its `resumed`."""
        path = self.path / "params.json"
        try:
            first = json.loads(path.read_text())[PROVENANCE_KEY]
            return first | {"resumed": [*first.get("resumed", []), dict(provenance)]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._warn(
                f"{path}: cannot be read ({_reason(error)}); where the run was started first is not known any more."
            )
            return dict(provenance) | {"resumed": [dict(provenance)]}

    def _kept_log(self, size: int) -> bytes:
        """The whole lines of the log's first `size` bytes."""
        path = self.path / "log"
        content = path.read_bytes()[:size] if path.exists() else b""
        kept = content[: content.rfind(b"\n") + 1]
        if len(kept) < size:
            found = f"{len(kept) if path.exists() else 'none'} of the {size} bytes"
            self._warn(
                f"{path}: {found} that it had when the state was saved are there; the run goes on without the lost records."
            )
        return kept

    def _open_events(self, *, purge_step: int | None) -> AppendedFile:
        """A new event file; earlier events from `purge_step` on are hidden from then on."""
        # TensorBoard reads the files in the order of their names, so that the newest needs the latest time.
        found = [re.match(r"events\.out\.tfevents\.(\d+)\.", file.name) for file in self.path.iterdir()]
        stamp = max([int(time.time()), *(int(match.group(1)) + 1 for match in found if match)])
        path = self.path / f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}"
        file = AppendedFile(path, on_failure=self._note_failure)
        file.append(_framed(Event(wall_time=time.time(), file_version="brain.Event:2")))
        if purge_step is not None:
            log = SessionLog(status=SessionLog.START)
            file.append(_framed(Event(wall_time=time.time(), step=purge_step, session_log=log)))
        return file

    def _add_events(self, record: Mapping[str, Any]) -> None:
        group = "epoch" if "top1" in record else "step"
        numbers = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k not in ("step", "epoch")}
        if numbers:
            values = [Summary.Value(tag=f"{group}/{key}", simple_value=value) for key, value in numbers.items()]
            self._events.append(_event(Summary(value=values), step=record.get("step", 0)))

    def _save(self, network: nn.Module, path: Path) -> bool:
        """Write the weights; False, with a warning, where that fails."""
        state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
        try:
            write_atomically(path, lambda file: torch.save(state, file))
        except (OSError, RuntimeError) as error:  # torch.save hides some failures of the file in a RuntimeError
            self._warn_unwritten(path, error, "the weights saved before are untouched")
            return False
        return True

    def _delete_old(self, name: str) -> None:
        saved = self._saved[name]
        while self.keep and len(saved) > self.keep:
            path = self.path / f"{name}_{saved[0]}.pt"
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                self._warn(f"{path}: cannot be deleted ({_reason(error)}).")
                return
            saved.pop(0)

    def _note_failure(self, path: Path, error: OSError) -> None:
        """Log and events fail many times a minute, and mostly together: one warning for both."""
        if time.monotonic() - self._warned_at >= WARN_SECONDS:
            self._warned_at = time.monotonic()
            self._warn_unwritten(path, error, "its records are kept in memory and tried again with the next")

    def _warn_unwritten(self, path: Path, error: Exception, consequence: str) -> None:
        self._warn(f"{path}: cannot be written ({_reason(error)}); {consequence}.")


class AppendedFile:
    """A file of whole records, each appended by one write; those that the disk does not take wait for the next try.

    A network file system may report a full disk as late as at the sync, so records are kept in memory up to then.

    Args:
        path: created where it is missing.
        on_failure: called with the path and the error of every try that fails.
        size: bytes of the present file to keep; None keeps all.

    Attributes:
        synced: bytes of the whole records that are safely on the disk.
        waiting: records not in the file, oldest first.

    Raises:
        OSError: the file cannot be opened or cut; later failures go to `on_failure`.
    """

    def __init__(self, path: Path, *, on_failure: Callable[[Path, OSError], None], size: int | None = None) -> None:
        self.path, self._on_failure = path, on_failure
        self.waiting: deque[bytes] = deque()
        self._unsynced: list[bytes] = []
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._whole = size  # bytes to cut the file to before anything is written; None: it ends with a whole record
        self._cut()
        self.synced = os.fstat(self._file).st_size

    def append(self, record: bytes) -> None:
        """Add a record, after those that wait."""
        self.waiting.append(record)
        self._write_waiting()

    def sync(self) -> None:
        """Write what waits and wait for the disk; afterwards each record is within `synced` bytes or in `waiting`."""
        self._write_waiting()
        try:
            os.fsync(self._file)
            self.synced = os.fstat(self._file).st_size if self._whole is None else self._whole
        except OSError as error:
            self.waiting.extendleft(reversed(self._unsynced))
            self._whole = self.synced
            self._fail(error)
        self._unsynced.clear()

    def close(self) -> None:
        """Write and sync what can be; the file is not to be used afterwards."""
        self.sync()
        try:
            os.close(self._file)
        except OSError as error:
            self._on_failure(self.path, error)

    def _write_waiting(self) -> None:
        try:
            self._cut()
            while self.waiting:
                record = self.waiting[0]
                self._whole = os.fstat(self._file).st_size
                written = os.write(self._file, record)
                if written < len(record):
                    raise OSError(None, f"the disk took {written} of {len(record)} bytes")
                self._whole = None
                self._unsynced.append(self.waiting.popleft())
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        with suppress(OSError):  # the cut is tried again before the next write
            self._cut()
        self._on_failure(self.path, error)

    def _cut(self) -> None:
        """Cut away what is no whole record."""
        if self._whole is not None and os.fstat(self._file).st_size > self._whole:
            os.ftruncate(self._file, self._whole)
        self._whole = None


def read_status(folder: Path) -> dict[str, Any] | None:
    """What status.json of a run folder says; None where there is none, or it cannot be read."""
    try:
        status = json.loads((folder / STATUS).read_text())
    except (OSError, ValueError):
        return None
    return status if isinstance(status, dict) else None


def mark_status(folder: Path, status: str, reason: str = "") -> None:
    """Change the status of a run that has one, before or without opening its folder; its step and epoch stay.

    Best effort: a disk that takes nothing has its say when the folder is opened.
    """
    before = read_status(folder)
    if before is not None:
        with suppress(OSError):
            _write_status(folder, before | {"status": status, "reason": reason})


def _write_status(folder: Path, content: Mapping[str, Any]) -> None:
    content = {**content, "time": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    write_atomically(folder / STATUS, lambda file: file.write(json.dumps(content, indent=2).encode()))


def _records_from(lines: list[bytes], *, step: int) -> list[dict[str, Any]]:
    """The records at the end of a log's lines that have at least this step."""
    records: list[dict[str, Any]] = []
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:  # edited by hand
            break
        if not isinstance(record, dict) or not isinstance(record.get("step"), int) or record["step"] < step:
            break
        records.append(record)
    return records[::-1]


def _event(summary: Summary, *, step: int) -> bytes:
    return _framed(Event(wall_time=time.time(), step=step, summary=summary))


def _framed(event: Event) -> bytes:
    """An event as it stands in a TensorBoard file: with its length and checksums."""
    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()


def _plain(value: Any) -> Any:
    """The value with non-finite numbers, however deep in lists and dicts, as strings."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _reason(error: Exception) -> str:
    """One line: the system's words where a failing file is at the bottom of it, else the error's first line."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    lines = str(getattr(cause, "strerror", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
