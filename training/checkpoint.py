"""Training states on disk: they are written completely or not at all, and the previous one is kept."""

from __future__ import annotations

import errno
import math
import os
import pickle
import re
import threading
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.errors import UserError, cause_of
from common.files import damaged_record, writable, write_atomically
from training.console import warn
from training.stop import PATIENCE_VARIABLE

LAST, PREVIOUS = "last.pt", "last.previous.pt"
_NEXT = "last.next.pt"


class DamagedState(UserError):
    """The file at `path` is not a complete training state; `reason` is a phrase that says why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged ({reason}); expected a complete training state.")
        self.path, self.reason = path, reason


class Write(NamedTuple):
    """Result of one write: the state's step, the error (None if it is on disk), and the seconds including the copy."""

    step: int
    error: str | None
    seconds: float


class StateFiles:
    """Writes training states to `folder`, which must exist: the newest as last.pt, the one before as last.previous.pt.

    A write needs host memory for one copy of the state, and disk space for three. Only one process of a run writes.
    """

    def __init__(self, folder: Path) -> None:
        """Delete unfinished files of a killed process; raise `UserError` if they cannot be deleted."""
        self.folder = folder
        self._writer: threading.Thread | None = None
        self._outcomes: deque[Write] = deque()
        self._last_is_whole = False
        with writable("logging.folder", folder):
            for leftover in [folder / _NEXT, *folder.glob(f".{_NEXT}.*.part")]:
                leftover.unlink(missing_ok=True)

    def save(self, state: Mapping[str, Any]) -> None:
        """Copy `state` to the host, and write it in the background; first wait for a write that still runs.

        Args:
            state: nested mappings, lists and tuples of tensors (any device) and of int, float, bool, str, None; contains the int
                "step". Mappings become dicts, parameters become plain tensors; tensors that share memory become separate ones.

        Raises `TypeError` for anything else. A failed write, or a state with NaN or infinity in a tensor, raises nothing but gives
        a `Write` with an error; then the states on disk stay unchanged.
        """
        self.wait()
        if type(state.get("step")) is not int:
            raise TypeError(f'state["step"]: expected an int, got {state.get("step")!r}')
        begin = time.monotonic()
        snapshot = _snapshot(state, "state")
        # Not a daemon thread: a started write is finished even if the process is ending.
        self._writer = threading.Thread(target=self._write, args=(snapshot, begin), name="training state")
        self._writer.start()

    def wait(self) -> None:
        """Wait until no write is running."""
        if self._writer is not None:
            self._writer.join()

    def outcomes(self) -> list[Write]:
        """Return the writes that ended since the last call, oldest first."""
        return [self._outcomes.popleft() for _ in range(len(self._outcomes))]

    def _write(self, state: dict[str, Any], begin: float) -> None:
        error = None
        try:
            self._replace_last(state)
        except Exception as failure:  # no caller can catch it in this thread, so the outcome carries it
            error = cause_of(failure)
        self._outcomes.append(Write(state["step"], error, time.monotonic() - begin))

    def _replace_last(self, state: dict[str, Any]) -> None:
        for name, tensor in _tensors(state, "state"):
            if not _is_finite(tensor):
                raise ValueError(f"{name} contains NaN or infinity, so training cannot resume from this state")
        new, last = self.folder / _NEXT, self.folder / LAST
        try:
            write_atomically(new, lambda file: torch.save(state, file))
            _verify(new)  # also detects that torch is configured to write no checksums
            # A damaged last.pt must not replace the previous state, from which training then resumed.
            if last.exists() and (self._last_is_whole or _is_whole(last)):
                os.replace(last, self.folder / PREVIOUS)
            os.replace(new, last)
        finally:
            new.unlink(missing_ok=True)
        self._last_is_whole = True
        _sync_folder(self.folder)


class Checkpointer:
    """Saves training states when they are due.

    Args:
        files: None on processes that do not write.
        minutes, steps: interval between two states; 0: not by time, or not by steps.
        step: optimiser step at which the run starts.
        stored: step of the newest state on disk, 0 without one; start value of the attribute `stored_step`.
        patience: seconds from SIGTERM to SIGKILL, if a launcher sends both; a save that may take longer gives one warning.
    """

    def __init__(
        self,
        files: StateFiles | None,
        *,
        minutes: float,
        steps: int,
        step: int,
        stored: int,
        patience: float | None = None,
    ) -> None:
        self._files, self._minutes, self._steps, self._patience = files, minutes, steps, patience
        self._saved_at, self._saved_step = time.monotonic(), step
        self.stored_step = stored

    def is_due(self, step: int) -> bool:
        """Return whether a state is to be saved at optimiser step `step`."""
        by_time = self._minutes and time.monotonic() - self._saved_at >= 60 * self._minutes
        by_steps = self._steps and step - self._saved_step >= self._steps
        return bool(by_time or by_steps)

    def save(self, step: int, state: Callable[[], Mapping[str, Any]]) -> None:
        """Pass the state to the writer, which runs in the background."""
        self._saved_at, self._saved_step = time.monotonic(), step
        if self._files is not None:
            self._files.save(state())

    def has_stored(self, *, wait: bool = False) -> bool:
        """Return whether a state was written since the last call; warn about failed writes. `wait`: until a running write ends."""
        if self._files is None:
            return False
        if wait:
            self._files.wait()
        before = self.stored_step
        for outcome in self._files.outcomes():
            if outcome.error is None:
                self.stored_step = outcome.step
                self._warn_if_slow(outcome.seconds)
            else:
                warn(
                    f"the training state of step {outcome.step} cannot be written ({outcome.error}); training continues, and the "
                    f"state of step {self.stored_step} is kept."
                )
        return self.stored_step != before

    def _warn_if_slow(self, seconds: float) -> None:
        # Twice the time: a stop may have to wait for another write first.
        if self._patience is not None and 2 * seconds > self._patience:
            warn(
                f"a training state takes {seconds:.2g} s to save, but torchrun kills {self._patience:g} s after SIGTERM: start "
                f"it with {PATIENCE_VARIABLE}={math.ceil(4 * seconds)} (needs a PyTorch after 2.6), or stop the run with its "
                "file `stop`."
            )
            self._patience = None


def read_state(path: Path) -> dict[str, Any]:
    """Read the state that `StateFiles` wrote to `path`, onto the CPU. Verify all checksums; execute nothing in the file.

    Raises `DamagedState`, `UserError` for a complete file that is not a training state, and `OSError` for a file that does not
    exist or is not readable.
    """
    _verify(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise UserError(
            f"{path} is rejected: it contains Python objects or code{what}, which are never loaded; expected a training "
            "state of tensors and plain values."
        ) from error
    except Exception as error:  # torch's reader raises many undocumented types
        raise DamagedState(path, cause_of(error)) from error
    if not isinstance(state, dict) or type(state.get("step")) is not int:
        raise UserError(
            f'{path} is not a training state: expected a dict with the int "step" like {LAST}, got '
            f"{type(state).__name__} without it; give a file of weights as model.ckpt_path."
        )
    return state


def newest_state(folder: Path) -> tuple[dict[str, Any], Path, list[str]] | None:
    """Return the newest complete state in `folder`, its file, and a sentence for each damaged file that was skipped.

    Return None if there is no state. Raise `UserError` if no file is complete, or if one is not a state or not readable.
    """
    damaged: list[DamagedState] = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not os.path.lexists(path):
            continue
        try:
            state = read_state(path)
        except DamagedState as error:
            damaged.append(error)
            continue
        except OSError as error:
            raise UserError(f"{path}: expected a training state, but it cannot be read ({error.strerror}).") from error
        warnings = [
            f"{error.path} is damaged ({error.reason}); the previous state, {path.name} of step {state['step']}, is used."
            for error in damaged
        ]
        return state, path, warnings
    if not damaged:
        return None
    found = "; ".join(f"{error.path.name} is damaged ({error.reason})" for error in damaged)
    raise UserError(
        f"{folder}: expected a complete training state, but {found}. --training.resume=none starts from scratch; together "
        "with --model.ckpt_path=<weights file> it starts from saved weights."
    )


# ------------------------------------------------------------------------------------------------ states in memory
def _snapshot(value: Any, name: str) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)  # keeps the memory format, such as channels_last
    if isinstance(value, Mapping):
        return {_checked(key, f"a key of {name}"): _snapshot(item, f"{name}[{key!r}]") for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_snapshot(item, f"{name}[{i}]") for i, item in enumerate(value))
    return _checked(value, name)


def _checked(value: Any, name: str) -> Any:
    # Check the exact type: NumPy's float64 is a float too, but torch.load would reject it.
    if value is not None and type(value) not in (bool, int, float, str):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(f"{name}: expected a tensor or a plain value, got {kind}")
    return value


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(item, f"{name}[{key!r}]")


def _is_finite(tensor: Tensor) -> bool:
    if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    # Both extremes are NaN if any value is. isfinite() of all values would need more memory, and several times the time.
    extremes = torch.aminmax(torch.view_as_real(tensor) if tensor.is_complex() else tensor)
    return all(bool(extreme.isfinite()) for extreme in extremes)


# ------------------------------------------------------------------------------------------------ states on disk
def _verify(path: Path) -> None:
    # torch.save writes the checksum of every record, but torch.load does not check them.
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = damaged_record(archive)
    except (FileNotFoundError, PermissionError):
        raise  # the file's contents are unknown
    except Exception as error:  # zipfile raises many types for a damaged file, and documents only a few
        raise DamagedState(path, _damage(path, error)) from error
    if wrong is not None:
        raise DamagedState(path, f"the checksum or header of {wrong} is wrong")


def _damage(path: Path, error: Exception) -> str:
    if path.is_file() and path.stat().st_size == 0:
        return "it is empty"
    if str(error) == "File is not a zip file":
        return "its end is missing, or it is another kind of file"
    return cause_of(error)


def _is_whole(path: Path) -> bool:
    try:
        _verify(path)
    except DamagedState:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(handle)
