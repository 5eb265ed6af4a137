"""Atomic writes, folder locks, checksums and JSON files."""

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

LOCK_FILE = "lock"  # in a folder that only one run at a time may use
# Errors of a file system without locks.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it and rename it to `path`. A failure leaves nothing behind."""
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
    """Rename `folder` to the first free `<folder>.1`, `<folder>.2` … if it contains more than a lock, so that nothing is lost."""
    if not folder.exists() or (folder.is_dir() and all(entry.name == LOCK_FILE for entry in folder.iterdir())):
        return None
    number = 1
    while (other := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(other)
    return other


@contextmanager
def writable(flag: str, folder: Path) -> Iterator[None]:
    """Turn a failure to create or write `folder` into a `UserError` that begins with the flag it came from."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{flag}: cannot write to {folder} ({error.strerror or error}).") from error


def take_folder(folder: Path, *, patience: float = 0.0) -> BinaryIO:
    """Lock an existing folder against other runs until the returned file is closed or this process ends.

    Args:
        folder: receives a file `lock`.
        patience: seconds to wait for a run that is about to end.

    Raises:
        UserError: another run has locked the folder.
        OSError: the folder cannot be written.
    """
    lock = open(folder / LOCK_FILE, "ab")
    # Otherwise a forked child, such as a loader worker that outlives its killed parent, would keep the lock.
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
                f"another run is working in {folder}; wait until it ends, or give another folder."
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                lock.close()
                raise
            print(f"warning: {folder} cannot be locked. Let only one run at a time use it.", file=sys.stderr)
            return lock


def damaged_record(archive: zipfile.ZipFile) -> str | None:
    """Return the name of the first damaged record of a file written by `torch.save`; None if all are intact.

    torch.load verifies no checksum, and no checksum covers the list of records. torch.save stores records uncompressed and
    without attributes. torch.load reads a record with the attribute "folder" as empty and returns uninitialised memory.

    Damage can raise nearly any exception in `zipfile`, which is passed on.
    """
    for record in archive.infolist():
        if record.external_attr or record.compress_type or record.compress_size != record.file_size:
            return record.filename
    return archive.testzip()


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal. The file is read in pieces."""
    digest = hashlib.sha256()  # hashlib.file_digest is not in Python 3.10
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if there is no file.

    Raises:
        UserError: the file cannot be read or contains something else.
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
