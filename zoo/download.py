"""Published files from a public share, whole and verified, or an error that says what to try.

A share's folder comes as one ZIP: `.<name>.zip.part` while it is under way, continued after a break. It is tested, its members are
unpacked beside their places, compared with the digests known so far, and moved into place; then the ZIP is removed. `sha256.json`
in the folder holds {link: {file: SHA-256}}: recorded at first use, enforced after.
"""

from __future__ import annotations

import email.utils
import errno
import fcntl
import hashlib
import importlib
import itertools
import json
import os
import re
import shutil
import socket
import stat
import sys
import time
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import requests
from tqdm import tqdm

from common.errors import UserError
from common.files import sha256, write_atomically
from zoo.robustbench import import_robustbench, robustbench_entry

DIGESTS = "sha256.json"
PIECE = 1 << 16  # bytes held at a time; as many are lost at most where a connection breaks
LONGEST_WAIT = 120.0  # seconds between two attempts, whatever the server asks for
MAX_REDIRECTS = 10
WHOLE_DOWNLOADS = 2  # a ZIP that came whole and is damaged is fetched once more, not as often as a connection is tried

# What tells two versions of the server's file apart: name in a part's notes → header.
VALIDATORS = {"etag": "ETag", "modified": "Last-Modified"}

WEIGHT_SUFFIXES = (".pt", ".pth", ".tar", ".ckpt", ".safetensors", ".bin")
LOGS = (".txt", ".log", ".json")
# Words in the names of weights. Those of `TRAINED` also describe how a clean model was trained, and count where no other does.
CLEAN = re.compile(r"clean|pretrain|standard|(?<![a-z])init")
ROBUST = re.compile(r"robust|linf|(?<![a-z])adv")
TRAINED = re.compile(r"(?<![a-z])(ema|full)(?![a-z])|(?<!\d)(50|100|250|300)(?!\d)")

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOGIN = re.compile(r"/(login|signin|sso|auth|authenticate|oauth2?)(/|$)", re.IGNORECASE)
REFUSED = {
    401: "asks for a login (status 401)",
    403: "is not allowed (status 403): the share was closed, or asks for a password",
    404: "does not exist (status 404): the share was removed or moved",
    410: "is gone (status 410): the share was removed",
}


@dataclass(frozen=True)
class ShareContent:
    """The files of a share, sorted by their names; each list in the order of names.

    Attributes:
        robust: adversarially trained weights.
        clean: weights that adversarial training started from.
        logs: texts.
        others: weights whose names say nothing, and everything else.
    """

    robust: list[Path]
    clean: list[Path]
    logs: list[Path]
    others: list[Path]


class ShareUnavailable(UserError):
    """The share cannot be had, or not as what it should be: another source of the same files may do."""


class _Retry(Exception):
    """This request failed in a way that may pass; `wait`: the seconds that the server asks for."""

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


@dataclass(frozen=True)
class _Source:
    """What is downloaded, as errors name it."""

    link: str
    name: str
    hint: str

    @property
    def url(self) -> str:
        parts = urlsplit(self.link)
        path = parts.path.rstrip("/")
        return urlunsplit(parts._replace(path=path if path.endswith("/download") else f"{path}/download"))

    def check(self) -> None:
        try:
            parts = urlsplit(self.link)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:
            valid = False
        if not valid:
            raise UserError(f"{self.name}: expected a link (https://…), got {self.link!r}. Try {self.others}.")

    @property
    def others(self) -> str:
        copy = f"RobustBench's copy by its id, {self.hint}, " if self.hint else ""
        return f"{copy}another link, or a local file by its path"

    def failed(self, what: str) -> ShareUnavailable:
        return ShareUnavailable(self._sentence(what))

    def changed(self, what: str) -> UserError:
        return UserError(self._sentence(what))

    def _sentence(self, what: str) -> str:
        return f"{self.name}: {self.url} {what}. Try {self.others}."


# The share


def download_share(
    link: str,
    folder: Path,
    *,
    name: str,
    hint: str = "",
    known: Mapping[str, str] | None = None,
    force: bool = False,
    progress: bool = True,
    attempts: int = 5,
    timeout: float = 30,
    sleep: Callable[[float], None] = time.sleep,
) -> ShareContent:
    """The files of a public Nextcloud share of a folder, in `folder`; what is there and agrees with its lock file is not fetched.

    A broken download goes on where it stopped, in this call and in a later one, if the server can do that.

    Args:
        link: the share; `<link>/download` answers with a ZIP of it.
        folder: made where missing. A folder that holds all of the ZIP's files is left out of their paths.
        name: names the partial file, the progress bar and errors.
        hint: the model's RobustBench id, if it has one: what errors suggest first.
        known: file name → SHA-256, enforced from the start.
        force: fetch afresh, and accept other content than the lock file records (not other than `known`).
        attempts: failed requests in a row, none of which brought the download further, before giving up.
        timeout: seconds without a byte.
        sleep: called with the seconds to wait before the next attempt.

    Raises:
        UserError: no such share, no connection, no ZIP, a damaged or unsafe one, a full disk, or other content than recorded.
    """
    source = _Source(link, name, hint)
    source.check()
    with _writing(folder, name), _alone(folder, name):
        part = _Part(folder, source, afresh=force)
        files = None if force else _finished(source, folder, known or {})
        if files is None:
            files = _fetch_and_unpack(
                source, part, folder, known or {}, force, _Fetching(progress, attempts, timeout, sleep)
            )
        part.discard()
    return sort_files(folder, files)


def _fetch_and_unpack(
    source: _Source, part: _Part, folder: Path, known: Mapping[str, str], force: bool, fetching: _Fetching
) -> list[str]:
    for left in reversed(range(WHOLE_DOWNLOADS)):
        fetching.run(source, part)
        try:
            digests = _unpack(source, part.path, folder, known, force)
        except UserError:
            part.discard()  # a later call must see what the server has then
            raise
        except _Damaged as error:
            part.discard()
            if not left:
                raise source.failed(f"sent a ZIP that is damaged or not whole ({error})") from error
        else:
            return sorted(digests)
    raise AssertionError("unreachable: the last download returns or raises")


class _Part:
    """A download under way: its bytes, and notes beside them by which a server's answer is known to continue them."""

    def __init__(self, folder: Path, source: _Source, *, afresh: bool) -> None:
        self.path = folder / f".{source.name}.zip.part"
        self._notes_file = folder / f".{source.name}.zip.json"
        self._link = source.link
        self.notes: dict[str, Any] = {}
        if self._notes_file.is_file():
            try:
                self.notes = json.loads(self._notes_file.read_bytes())
            except ValueError:  # without its notes, a part is of no use
                self.discard()
        if afresh or self.notes.get("link") != source.link or not self.path.is_file():
            self.discard()

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    @property
    def complete(self) -> bool:
        return self.notes.get("complete", False)

    @property
    def total(self) -> int | None:
        return self.notes.get("total")

    def range_headers(self) -> dict[str, str]:
        """The request's headers: the bytes not yet here, if the file is still the same."""
        if not self.size:
            return {}
        etag = self.notes.get("etag")
        # A weak tag does not promise the same bytes, and is not allowed here (RFC 9110, 13.1.5).
        same = self.notes.get("modified") if etag is None or etag.startswith("W/") else etag
        return {"Range": f"bytes={self.size}-"} | ({"If-Range": same} if same else {})

    def start(self, response: requests.Response) -> None:
        """Begin with the answer's first byte."""
        self.discard()
        length = response.headers.get("Content-Length", "")
        encoded = "Content-Encoding" in response.headers  # then the length is another one than what is read
        self._note(
            link=self._link,
            **{key: response.headers.get(header) for key, header in VALIDATORS.items()},
            total=int(length) if length.isdecimal() and not encoded else None,
        )

    def is_continued_by(self, response: requests.Response) -> bool:
        """Whether a 206 answer holds this file's bytes from the next one on."""
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        if found is None or int(found[1]) != self.size or "Content-Encoding" in response.headers:
            return False
        total = None if found[2] == "*" else int(found[2])
        pairs = [(self.total, total), *((self.notes.get(k), response.headers.get(h)) for k, h in VALIDATORS.items())]
        if any(None not in pair and pair[0] != pair[1] for pair in pairs):
            return False
        if self.total is None and total is not None:
            self._note(total=total)
        return True

    def is_all_of(self, response: requests.Response) -> bool:
        """Whether a 416 answer says that no byte is missing."""
        return response.headers.get("Content-Range", "").replace(" ", "") == f"bytes*/{self.size}"

    def end(self) -> None:
        """The answer ended in order. Raises _Retry if its length is known and another one came."""
        size = self.size
        if self.total is not None and size != self.total:
            if size > self.total:
                self.discard()
            raise _Retry(f"sent {size:,} bytes instead of {self.total:,}")
        self.finish()

    def finish(self) -> None:
        """All bytes are here."""
        self._note(complete=True)

    def discard(self) -> None:
        """Back to nothing."""
        self.path.unlink(missing_ok=True)
        self._notes_file.unlink(missing_ok=True)
        self.notes = {}

    def _note(self, **notes: Any) -> None:
        self.notes |= notes
        write_atomically(self._notes_file, lambda file: file.write(json.dumps(self.notes).encode()))


@dataclass(frozen=True)
class _Fetching:
    """How a ZIP is fetched; see `download_share`."""

    progress: bool
    attempts: int
    timeout: float
    sleep: Callable[[float], None]

    def run(self, source: _Source, part: _Part) -> None:
        """Until `part` is complete, by as many requests as it takes. Raises UserError where that is no use."""
        failures, furthest = 0, part.size
        with requests.Session() as session:
            session.max_redirects = MAX_REDIRECTS
            while not part.complete:
                wait = None
                try:
                    self._request(session, source, part)
                    continue
                except _Retry as error:
                    what, wait, cause = str(error), error.wait, error
                except requests.RequestException as error:
                    what, cause = self._reason(error, source, part), error
                if part.size > furthest:
                    failures, furthest = 0, part.size
                failures += 1
                if failures >= self.attempts:
                    kept = f"; {part.size:,} bytes are kept, the same command goes on from there" if part.size else ""
                    times = "once" if failures == 1 else f"{failures} times in a row"
                    raise source.failed(f"failed {times}; the last time it {what}{kept}") from cause
                self.sleep(min(2.0 ** (failures - 1) if wait is None else wait, LONGEST_WAIT))

    def _request(self, session: requests.Session, source: _Source, part: _Part) -> None:
        headers = {"Accept-Encoding": "identity", **part.range_headers()}
        try:
            response = session.get(source.url, headers=headers, stream=True, timeout=self.timeout)
        except requests.TooManyRedirects as error:
            raise source.failed(f"leads in a circle (more than {MAX_REDIRECTS} redirects)") from error
        except ValueError as error:  # urllib's or requests' about the address of a redirect
            raise source.failed(f"leads to what is no address of a web server ({error})") from error
        with response:
            _check_status(source, response)
            if response.status_code == 416:
                if not part.is_all_of(response):
                    part.discard()
                    raise _Retry("had no bytes to go on with (status 416)")
                part.finish()
                return
            pieces = response.iter_content(PIECE)
            if response.status_code == 206:
                if not part.is_continued_by(response):
                    part.discard()
                    raise _Retry("went on with another file or place")
            else:
                first = next(pieces, b"")
                _check_begins_a_zip(source, response, first)
                part.start(response)
                pieces = itertools.chain([first], pieces)
            self._write(source, part, pieces)
        part.end()

    def _write(self, source: _Source, part: _Part, pieces: Iterable[bytes]) -> None:
        bar = {"desc": source.name, "total": part.total, "initial": part.size, "disable": not self.progress}
        with part.path.open("ab") as file, tqdm(unit="B", unit_scale=True, unit_divisor=1024, **bar) as shown:
            for piece in pieces:
                file.write(piece)
                shown.update(len(piece))

    def _reason(self, error: requests.RequestException, source: _Source, part: _Part) -> str:
        """What went wrong with the connection, as the end of "the last time it …"."""
        causes = list(_causes(error))
        if any(isinstance(cause, socket.gaierror) for cause in causes):
            return f"led nowhere: no address is known for {urlsplit(source.url).hostname} (is there a network?)"
        if any(isinstance(cause, (requests.Timeout, TimeoutError)) for cause in causes):
            return f"was too slow: no byte in {self.timeout:g} s"
        of = f" of {part.total:,}" if part.total is not None else ""
        return f"gave no connection or broke off, with {part.size:,}{of} bytes here ({causes[-1]})"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _check_status(source: _Source, response: requests.Response) -> None:
    moved = f"leads to {response.url}, which " if response.history else ""
    code = response.status_code
    if moved and LOGIN.search(urlsplit(response.url).path):
        raise source.failed(f"leads to a login page, {response.url}: the share is not public (any more)")
    if code in REFUSED:
        raise source.failed(moved + REFUSED[code])
    if code in (408, 425, 429) or code >= 500:
        raise _Retry(f"{moved}answered with status {code} ({response.reason})", _retry_after(response))
    if code not in (200, 206, 416):
        raise source.failed(f"{moved}answered with status {code} ({response.reason})")
    if code == 416 and "Range" not in response.request.headers:
        raise source.failed(f"{moved}answered with status 416 though all was asked for")


def _retry_after(response: requests.Response) -> float | None:
    text = response.headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def _check_begins_a_zip(source: _Source, response: requests.Response, first: bytes) -> None:
    moved = f"leads to {response.url}, which " if response.history else ""
    kind = response.headers.get("Content-Type", "").lower()
    if "html" in kind or first.lstrip()[:1] == b"<":
        found = re.search(rb"<title[^>]*>(.*?)</title>", first, re.IGNORECASE | re.DOTALL)
        title = f" titled {' '.join(found[1].decode(errors='replace').split())!r}" if found else ""
        login = " and asks for a login" if re.search(rb"type=[\"']?password", first, re.IGNORECASE) else ""
        raise source.failed(f"{moved}sent a web page{title} instead of a ZIP{login}: the share was closed or moved")
    if not first:
        raise _Retry("sent nothing")
    if not any(magic.startswith(first[:4]) for magic in (b"PK\x03\x04", b"PK\x05\x06")):
        raise source.failed(f"{moved}sent no ZIP, but {kind or 'something'} that begins with {first[:8]!r}")


# The ZIP


class _Damaged(Exception):
    """The ZIP is not whole."""


def _unpack(source: _Source, path: Path, folder: Path, known: Mapping[str, str], force: bool) -> dict[str, str]:
    """Test the ZIP, unpack it beside its place, and move the files there if all of them are as expected; {file: SHA-256}."""
    staging = folder / f".{source.name}.files.part"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        try:
            archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise _Damaged(str(error)) from error
        with archive:
            members = _members(source, archive)
            _test(archive)
            digests = {name: _extract(archive, info, staging / name) for name, info in members.items()}
        locked = {} if force else _read_lock(folder)
        _compare(source, folder, digests, known=known, locked=locked)
        _move(source, staging, folder, digests, recorded={} if force else _by_file(locked), force=force)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    record(folder, source.link, digests)
    return digests


def _test(archive: zipfile.ZipFile) -> None:
    try:
        bad = archive.testzip()
    except (
        Exception
    ) as error:  # damaged members make the decoders raise nearly anything: zlib.error, EOFError, OSError, …
        raise _Damaged(f"{type(error).__name__}: {error}") from error
    if bad is not None:
        raise _Damaged(f"{bad} has a wrong checksum")


def _members(source: _Source, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The ZIP's files by their paths below the target, without a folder that holds them all. Raises UserError if one is unsafe."""
    infos = [info for info in archive.infolist() if not info.is_dir()]
    if not infos:
        raise source.failed("sent a ZIP without a file in it")
    for info in infos:
        reason = _unsafe(info)
        if reason is not None:
            raise source.failed(f"sent a ZIP whose member {info.filename!r} {reason}; nothing was unpacked")
    paths = [info.filename.split("/") for info in infos]
    if any(path[-1] == "data.pkl" for path in paths) and any(path[-1] == "version" for path in paths):
        raise source.failed("sent a single file of PyTorch, not the ZIP of a folder; save it with a browser")
    if len({path[0] for path in paths}) == 1 and all(len(path) > 1 for path in paths):
        paths = [path[1:] for path in paths]
    members = {}
    seen: set[str] = set()
    folders = {_folded(path[:depth]) for path in paths for depth in range(1, len(path))}
    for path, info in zip(paths, infos):
        if _folded(path) in seen or _folded(path) in folders or _folded(path) == DIGESTS:
            raise source.failed(
                f"sent a ZIP with a second file in the place of {'/'.join(path)!r}; nothing was unpacked"
            )
        seen.add(_folded(path))
        members["/".join(path)] = info
    return members


def _folded(path: list[str]) -> str:
    # Names that differ in case or in the form of accents are one file on some file systems.
    return unicodedata.normalize("NFC", "/".join(path)).casefold()


def _unsafe(info: zipfile.ZipInfo) -> str | None:
    mode = info.external_attr >> 16
    # The name in the list of members, and the one that Python takes instead of it where an extra field holds another.
    for name in (info.orig_filename, info.filename):
        if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
            return "has an absolute path"
        if any(part in ("", ".", "..") for part in re.split(r"[/\\]", name)):
            return "leads out of the folder"
        if "\\" in name or not name.isprintable():
            return "has a name that cannot be a file's"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        return "is a symbolic link or a device"
    if info.flag_bits & 1:
        return "is encrypted"
    return None


def _extract(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> str:
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with archive.open(info) as member, target.open("xb") as file:
        while piece := member.read(PIECE):
            digest.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _move(
    source: _Source,
    staging: Path,
    folder: Path,
    digests: Mapping[str, str],
    *,
    recorded: Mapping[str, str],
    force: bool,
) -> None:
    for name, digest in digests.items():
        final = folder / name
        final.parent.mkdir(parents=True, exist_ok=True)
        if not final.parent.resolve().is_relative_to(folder.resolve()):
            raise source.failed(f"holds {name}, and {final.parent} leads out of {folder}; nothing was written")
        if not force and name not in recorded and final.is_file() and sha256(final) != digest:
            raise UserError(
                f"{source.name}: {final} is there already, is not recorded in {folder / DIGESTS}, and differs from the file of "
                f"{source.link}. Try another folder, move the file away, or --force to replace it."
            )
    for name in digests:
        os.replace(staging / name, folder / name)


# The lock file


def verify(path: Path) -> str:
    """The SHA-256 of a file, or of each file that a folder's lock file names, and that the lock file agrees or names no such file.

    Raises:
        UserError: no such file, another digest than recorded, or a folder without a lock file.
    """
    if path.is_dir():
        names = sorted(_by_file(_read_lock(path)))
        if not names:
            raise UserError(f"{path}: expected a file, or a folder with a {DIGESTS} in it, got a folder without.")
        return "\n".join(verify(path / name) for name in names)
    if not path.is_file():
        raise UserError(f"{path}: expected a file or a folder, got nothing there.")
    digest = sha256(path)
    # A share may have folders: the lock file is beside the file or further up.
    folder = next(
        (parent for parent in path.absolute().parents if (parent / DIGESTS).is_file()), path.absolute().parent
    )
    recorded = _by_file(_read_lock(folder)).get(path.absolute().relative_to(folder).as_posix())
    if recorded is None:
        return f"{digest}  {path}: not recorded in a {DIGESTS}"
    if recorded != digest:
        raise UserError(
            f"{path}: {folder / DIGESTS} records the SHA-256 {recorded}, the file has {digest}. "
            "Try deleting the file and downloading it again."
        )
    return f"{digest}  {path}: agrees with {folder / DIGESTS}"


def record(folder: Path, link: str, digests: Mapping[str, str]) -> None:
    """Write what came from `link` to the folder's lock file; a file has one source, the last it came from."""
    content = {}
    for other, files in _read_lock(folder).items():
        kept = {name: digest for name, digest in files.items() if name not in digests}
        if kept and other != link:
            content[other] = kept
    content[link] = dict(sorted(digests.items()))
    write_atomically(folder / DIGESTS, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))


def _read_lock(folder: Path) -> dict[str, dict[str, str]]:
    file = folder / DIGESTS
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(
            f"{file}: expected the digests of downloaded files as JSON; {error}. Try deleting it."
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(files, dict) and all(isinstance(digest, str) for digest in files.values())
        for files in content.values()
    ):
        raise UserError(f"{file}: expected {{link: {{file: SHA-256}}}}. Try deleting it.")
    return content


def _by_file(lock: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    return {name: digest for files in lock.values() for name, digest in files.items()}


def _finished(source: _Source, folder: Path, known: Mapping[str, str]) -> list[str] | None:
    """The files of this link, if the lock file has it, all are there, and they are as expected."""
    lock = _read_lock(folder)
    files = lock.get(source.link, {})
    if not files or not all((folder / name).is_file() for name in files):
        return None
    digests = {name: sha256(folder / name) for name in files}
    for name, digest in digests.items():
        if digest != files[name]:
            raise UserError(
                f"{source.name}: {folder / name} was changed since it was downloaded: {folder / DIGESTS} records the SHA-256 "
                f"{files[name]}, the file has {digest}. Try deleting the file and downloading it again, or --force."
            )
    _compare(source, folder, digests, known=known, locked=lock)
    return sorted(digests)


def _compare(
    source: _Source,
    folder: Path,
    digests: Mapping[str, str],
    *,
    known: Mapping[str, str],
    locked: Mapping[str, Mapping[str, str]],
) -> None:
    """Raise UserError at the first file that is not what this project or the lock file says."""
    for name, expected in known.items():
        if digests.get(name) != expected:
            raise source.changed(
                f"holds {name} with the SHA-256 {digests.get(name, 'of nothing: it is not there')}, this project knows {expected}: "
                "the share's content was changed, or is another model's"
            )
    # Files of other links that this one lacks are none of its business.
    recorded = _by_file(locked)
    for name in {**digests, **locked.get(source.link, {})}:
        if name in recorded and digests.get(name) != recorded[name]:
            raise source.changed(
                f"holds {name} with the SHA-256 {digests.get(name, 'of nothing: it is not there')}, {folder / DIGESTS} records "
                f"{recorded[name]}: the share's content was changed. Deleting {folder / DIGESTS}, or --force, accepts it"
            )


# Disk


@contextmanager
def _writing(folder: Path, name: str) -> Iterator[None]:
    """Turn a disk that is full, or refuses, into an error that says so; what was downloaded stays."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise UserError(
                f"{name}: cannot write to {folder} ({error.strerror or error}). Try another folder."
            ) from error
        raise UserError(
            f"{name}: no room left in {folder} ({error.strerror}). Make room for the ZIP and its files, or try another folder; "
            "what has come is kept, and the same command goes on from there."
        ) from error


@contextmanager
def _alone(folder: Path, name: str) -> Iterator[None]:
    """Let one process at a time download to `folder`: jobs that start together on a shared disk ask for the same file."""
    with open(folder / ".download.lock", "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{name}: waiting for another process that downloads to {folder}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# Which file is which


def sort_files(folder: Path, names: Iterable[str]) -> ShareContent:
    """Tell weights and logs apart by their names, and where a name says nothing by its folders below `folder`."""
    sorted_names: dict[str, list[str]] = {"robust": [], "clean": [], "logs": [], "others": []}
    unknown = []
    for name in sorted(names):
        path = Path(name)
        if path.suffix.lower() in WEIGHT_SUFFIXES and not path.name.startswith(
            "."
        ):  # macOS leaves `._<name>` beside files
            kind = _kind(path.name) or _kind(path.parent.as_posix())
            (unknown if kind is None else sorted_names[kind]).append(name)
        else:
            sorted_names["logs" if path.suffix.lower() in LOGS else "others"].append(name)
    alone = len(unknown) == 1 and not sorted_names["robust"]
    sorted_names["robust" if alone else "others"] += unknown
    return ShareContent(**{kind: [folder / name for name in sorted(found)] for kind, found in sorted_names.items()})


def _kind(text: str) -> str | None:
    text = text.lower()
    clean, robust = CLEAN.search(text), ROBUST.search(text)
    if clean and robust:
        return None
    if clean:
        return "clean"
    return "robust" if robust or TRAINED.search(text) else None


def choose(content: ShareContent, kind: str, fits: Callable[[Path], bool] = lambda path: True) -> Path:
    """The one file of `kind` ("robust" or "clean") that fits; a share may hold several models'.

    Weights whose names say nothing are taken for robust ones where they are the only ones that fit.

    Args:
        content: of the share.
        kind: what is wanted.
        fits: whether a file holds weights of the model in question.

    Raises:
        UserError: none, or more than one.
    """
    named = {"robust": content.robust, "clean": content.clean}[kind]
    found = [path for path in named if fits(path)]
    unnamed = [
        path for path in content.others if path.suffix.lower() in WEIGHT_SUFFIXES and not path.name.startswith(".")
    ]
    if not found and kind == "robust":
        found = [path for path in unnamed if fits(path)]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(map(str, found or [*content.robust, *content.clean, *content.others])) or "no weights at all"
    problem = "several files could be it" if found else "no file of the share is it"
    raise UserError(
        f"expected one file of {kind} weights for this model, but {problem}: {listed}. Give one by its path."
    )


# RobustBench


def download_robustbench(robustbench_id: str, folder: Path, *, force: bool = False) -> Path:
    """RobustBench's copy of an ImageNet model for Linf, by its own downloader, as `<folder>/<id>.pt`.

    Digests are recorded and enforced as those of a share are.

    Raises:
        UserError: RobustBench does not have it, the download failed, or other content than recorded.
    """
    gdrive_id = robustbench_entry(robustbench_id)["gdrive_id"]
    import_robustbench()
    utils = importlib.import_module("robustbench.utils")
    # Version 1.1.1 loads models with the first; older ones have only the second.
    download = getattr(utils, "download_gdrive_new", None) or utils.download_gdrive
    link, final = f"robustbench:{robustbench_id}", folder / f"{robustbench_id}.pt"
    other = "Try the model's link, or a local file by its path."
    with _writing(folder, robustbench_id), _alone(folder, robustbench_id):
        recorded = None if force else _by_file(_read_lock(folder)).get(final.name)
        if recorded is not None and final.is_file():
            verify(final)
            return final
        part = folder / f".{final.name}.part"
        part.unlink(missing_ok=True)
        try:
            _run_downloader(download, gdrive_id, part, robustbench_id, other)
            digest = sha256(part)
            if recorded not in (None, digest):
                raise UserError(
                    f"{robustbench_id}: RobustBench sent a file with the SHA-256 {digest}, {folder / DIGESTS} records {recorded}. "
                    f"To accept it delete {folder / DIGESTS} or give --force. Otherwise: {other}"
                )
            if recorded is None and not force and final.is_file() and sha256(final) != digest:
                raise UserError(
                    f"{final} is there already, is not recorded in {folder / DIGESTS}, and differs from RobustBench's. "
                    "Try another folder, move the file away, or --force to replace it."
                )
            os.replace(part, final)
        finally:
            part.unlink(missing_ok=True)
        record(folder, link, {final.name: digest})
    return final


def _run_downloader(download: Callable[[str, str], Any], gdrive_id: str, part: Path, name: str, other: str) -> None:
    try:
        download(gdrive_id, str(part))
    except Exception as error:  # the downloaders raise what their libraries do
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{name}: RobustBench's downloader failed ({type(error).__name__}: {reason}). {other}"
        ) from error
    start = b""
    if part.is_file():
        with part.open("rb") as file:
            start = file.read(20)
    if not start.startswith((b"PK\x03\x04", b"\x80")):  # torch.save's ZIP, or its older pickle
        raise UserError(f"{name}: RobustBench's downloader brought no weights, but {start!r}. {other}")
