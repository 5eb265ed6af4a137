"""Files that are whole or not there."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import UserError

LOCK_FILE = "lock"  # file in a folder that one run at a time works in
# A file system without locks.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it, and rename it to `path`; leaves nothing behind on failure."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def set_aside(folder: Path) -> Path | None:
    """Rename `folder`, if it holds anything but a lock, to the first free `<folder>.1`, `<folder>.2` …, so that nothing is lost."""
    if not folder.exists() or (folder.is_dir() and all(entry.name == LOCK_FILE for entry in folder.iterdir())):
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


def take_folder(folder: Path, *, patience: float = 0.0) -> BinaryIO:
    """Keep other runs from writing to an existing folder, until the file returned is closed or this process ends.

    Args:
        folder: gets a file `lock`.
        patience: seconds to wait for a run that is about to end.

    Raises:
        UserError: another run holds it.
        OSError: it cannot be written.
    """
    lock = open(folder / LOCK_FILE, "ab")
    # A forked child, such as a loader worker that outlives its killed parent, would hold the lock too.
    os.register_at_fork(after_in_child=lock.close)
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError as error:
            if time.monotonic() < until:
                time.sleep(0.2)
                continue
            lock.close()
            raise UserError(
                f"another run is working in {folder}; wait for it to end, or give another folder."
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                lock.close()
                raise
            print(f"warning: {folder} cannot be locked: see to it that one run at a time uses it.", file=sys.stderr)
            return lock


def damaged_record(archive: zipfile.ZipFile) -> str | None:
    """Name of the first record of a file of `torch.save` that is not as it was written; None if all are.

    torch.load looks at no checksum, and no checksum covers the list of records. torch.save stores records as they are, without
    attributes; torch.load takes one with the attribute "folder" for empty, and gives a tensor of whatever was in memory.

    Raises what `zipfile` does for damage: nearly anything.
    """
    for record in archive.infolist():
        if record.external_attr or record.compress_type or record.compress_size != record.file_size:
            return record.filename
    return archive.testzip()


def sha256(path: Path) -> str:
    """A file's SHA-256 in hexadecimal, read in pieces."""
    digest = hashlib.sha256()  # hashlib.file_digest is not in Python 3.10
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); expected a JSON object.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return content
