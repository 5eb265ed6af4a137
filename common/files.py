"""Files that are whole or not there."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from common.errors import UserError


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it, and rename it to `path`; leaves nothing behind on failure."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    # The umask can only be read by setting it; /proc has it without that race where it exists.
    status = Path("/proc/self/status")
    found = re.search(r"^Umask:\s*(\d+)", status.read_text(), re.MULTILINE) if status.exists() else None
    return int(found.group(1), 8) if found else 0o022


def set_aside(folder: Path) -> Path | None:
    """Rename `folder`, if it exists and holds anything, to the first free `<folder>.1`, `<folder>.2` …, so that nothing is lost."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    number = 1
    while (other := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(other)
    return other


@contextmanager
def writable(flag: str, folder: Path) -> Iterator[None]:
    """Turn a failure to create or write `folder` into an error that names the flag it came from."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{flag}: cannot write to {folder} ({error.strerror or error}).") from error
