"""Download of published weights from a share, Google Drive, the Hugging Face Hub or a web server, complete and verified.

An unfinished download is `.<name>.part`; it resumes after an interruption. The files are unpacked in a temporary folder, tested,
compared with the known digests, and moved into the folder. `sha256.json` there contains {link: {file: SHA-256}}.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO

import requests
from huggingface_hub import hf_hub_url
from tqdm import tqdm
from urllib3.util import Retry

from common.errors import UserError
from common.files import read_json, sha256, take_folder, write_atomically
from zoo.robustbench import robustbench_entry

DIGESTS = "sha256.json"
GOOGLE_DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="
WEIGHT_SUFFIXES = (".pt", ".pth", ".tar", ".ckpt", ".safetensors", ".bin")
PIECE = 1 << 16  # bytes per read; a broken connection loses at most that many
TIMEOUT = 30.0  # seconds without data
RETRY = Retry(4, backoff_factor=1.0)  # for consecutive failures without progress
PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses of temporary failures
REFUSED = {401: "requires a login", 403: "is not public", 404: "does not exist", 410: "was removed"}
BOMB_FACTOR, BOMB_BYTES = 20, 100 << 20  # limits of a ZIP's growth: weights hardly compress


class ShareUnavailable(UserError):
    """The files are not available, or are not what they should be; another source may work."""


def download(
    link: str, folder: Path, *, name: str, hint: str = "", known: Mapping[str, str] | None = None, force: bool = False
) -> list[Path]:
    """Download the weights and logs of a link to `folder`; files that match their digests are not downloaded again.

    Args:
        link: `hub:<owner>/<repository>:<file>`, `drive:<id>`, `robustbench:<id>`, the URL of a weights file, or the URL of a public
            share, for which `<link>/download` returns a ZIP of a folder. A single file becomes `<name>.pt`.
        name: name of the partial file, shown in progress bar and errors; hint: the model's RobustBench id, if it has one.
        known: file name → SHA-256, always enforced.
        force: download again, and accept content that differs from the record (but not from `known`).

    Raises:
        UserError: the disk is full, or the content differs from the record; `ShareUnavailable`: no complete weights available.
    """
    advice = (hint and f"RobustBench's copy (id {hint}), ") + "another link, or the path of a local file"
    return _download(name, link, _address(link), folder, advice, known or {}, force)


def _address(link: str) -> str:
    kind, _, rest = link.partition(":")
    if kind == "hub":
        return hf_hub_url(*rest.split(":"))
    if kind in ("drive", "robustbench"):
        return GOOGLE_DRIVE + (rest if kind == "drive" else robustbench_entry(rest)["gdrive_id"])
    return link if link.endswith(WEIGHT_SUFFIXES) else link.rstrip("/").removesuffix("/download") + "/download"


def verify(path: Path) -> str:
    """Return the SHA-256 of a file, or of each file in a folder's record; raise UserError if it differs from the record."""
    folder = path if path.is_dir() else path.parent
    recorded = {file: digest for files in _recorded(folder).values() for file, digest in files.items()}
    if path.is_dir() and recorded:
        return "\n".join(verify(path / file) for file in sorted(recorded))
    if not path.is_file():
        raise UserError(f"{path}: expected a file, or a folder that contains {DIGESTS}.")
    digest, expected = sha256(path), recorded.get(path.name)
    if expected not in (None, digest):
        problem = f"{folder / DIGESTS} records the SHA-256 {expected}, but the file has {digest}"
        raise UserError(f"{path}: {problem}. Try deleting the file and downloading it again.")
    return f"{digest}  {path}: {'agrees with' if expected else 'not recorded in'} {folder / DIGESTS}"


def _recorded(folder: Path) -> dict[str, dict[str, str]]:
    content = read_json(folder / DIGESTS) or {}
    if not all(isinstance(files, dict) for files in content.values()):
        raise UserError(f"{folder / DIGESTS}: expected {{link: {{file: SHA-256}}}}. Try deleting it.")
    return content


def _download(name: str, link: str, url: str, folder: Path, advice: str, known: Mapping, force: bool) -> list[Path]:
    part, staging = folder / f".{name}.part", folder / f".{name}.files"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder, name):
            recorded = _recorded(folder)
            digests = {} if force else recorded.get(link, {})
            if digests and digests.items() >= known.items() and all((folder / file).is_file() for file in digests):
                return [folder / file for file in digests if verify(folder / file)]
            if force:
                _discard(part)
            _fetch(url, part, name)
            try:
                _unpack(part, staging, name)
                digests = {file.name: sha256(file) for file in sorted(staging.iterdir())}
                expected = {} if force else _expected(digests, folder, link, recorded)
                for file, digest in (expected | dict(known)).items():
                    if digests.get(file) != digest:
                        came = f"contains {file} with the SHA-256 {digests.get(file, '(none: the file is missing)')}"
                        accept = f"To accept this content, move {folder} away or force the download; else try {advice}"
                        raise UserError(f"{name}: {url} {came}; expected {digest}. {accept}.")
                for file in digests:
                    os.replace(staging / file, folder / file)
            except UserError:
                _discard(part)  # a later call must download again
                raise
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            for files in recorded.values():  # each file has one source: the last one
                for file in digests:
                    files.pop(file, None)
            content = {source: files for source, files in recorded.items() if files} | {link: digests}
            write_atomically(folder / DIGESTS, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))
            _discard(part)
    except ShareUnavailable as error:
        raise ShareUnavailable(f"{name}: {url} {error}. Try {advice}.") from error
    except OSError as error:
        problem = f"cannot write to {folder} ({error.strerror or error}); the downloaded part is kept"
        raise UserError(f"{name}: {problem}. Free space there, or try another folder.") from error
    return [folder / file for file in digests]


def _lock(folder: Path, name: str) -> BinaryIO:
    """Lock `folder` for one process, because jobs that start together on a shared disk request the same file."""
    with suppress(UserError):
        return take_folder(folder)
    print(f"{name}: waiting for another process that downloads to {folder}", file=sys.stderr)
    return take_folder(folder, patience=float("inf"))


def _expected(digests: Iterable[str], folder: Path, link: str, recorded: Mapping[str, dict]) -> dict[str, str]:
    """Return the expected SHA-256 of a link's files: the recorded one, else that of the file in `folder`."""
    expected = {file: sha256(folder / file) for file in digests if (folder / file).is_file()}
    for source, files in recorded.items():
        expected |= {file: files[file] for file in files if source == link or file in digests}
    return expected


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    part.with_suffix(".json").unlink(missing_ok=True)


def _fetch(url: str, part: Path, name: str) -> None:
    """Complete a partial file, with several requests if needed; notes next to it show whether a response continues it."""
    retry, furthest = RETRY, 0
    while True:
        notes = {}
        with suppress(UserError):
            notes = read_json(part.with_suffix(".json")) or {}
        if notes.get("url") != url or not part.is_file():
            part.write_bytes(b"")
        size = part.stat().st_size
        if size and size == notes.get("total"):
            return
        try:
            return _request(url, part, size, notes, name)
        except ValueError as error:
            raise ShareUnavailable(f"is not a valid URL of a web server ({error})") from error
        except requests.RequestException as error:
            cause: BaseException = error
            while cause.__context__ is not None:
                cause = cause.__context__
            size = part.stat().st_size
            retry, furthest = RETRY if size > furthest else retry, max(furthest, size)
            if not retry.total:
                raise ShareUnavailable(f"failed repeatedly: {cause} ({size:,} bytes are kept)") from error
            retry = retry.increment(error=error)
            retry.sleep()


def _request(url: str, part: Path, size: int, notes: Mapping[str, Any], name: str) -> None:
    """Append one response to the partial file. RequestException means a failure for which a retry may help."""
    asked = {"Accept-Encoding": "identity"}
    if size and notes["validator"]:  # without it, a response may be of another version of the file
        asked |= {"Range": f"bytes={size}-", "If-Range": notes["validator"]}
    with requests.get(url, headers=asked, stream=True, timeout=TIMEOUT) as response:
        status, headers = response.status_code, response.headers
        etag, length = headers.get("ETag", ""), headers.get("Content-Length", "")
        validator = etag if etag.startswith('"') else headers.get("Last-Modified")  # weak tags are not used
        if status in PASSING:
            raise requests.ConnectionError(f"status {status}, {response.reason}")
        if status not in (200, 206, 416):
            raise ShareUnavailable(f"{REFUSED.get(status, 'gave no file')} (status {status} of {response.url})")
        if "html" in headers.get("Content-Type", "").lower():
            raise ShareUnavailable("sent a web page: the file was moved, requires a login, or its quota is exceeded")
        if status == 200:
            part.write_bytes(b"")
            size, notes = 0, {"url": url, "validator": validator, "total": int(length) if length.isdecimal() else None}
            part.with_suffix(".json").write_text(json.dumps(notes))
        elif validator not in (None, notes["validator"]) or f"bytes {size}-" not in headers.get("Content-Range", ""):
            part.write_bytes(b"")
            raise requests.ConnectionError("the server sent other bytes than requested")
        with part.open("ab") as file, tqdm.wrapattr(file, "write", notes["total"], desc=name, initial=size) as shown:
            for piece in response.iter_content(PIECE):
                shown.write(piece)
    if notes["total"] not in (None, part.stat().st_size):
        raise requests.ConnectionError(f"{part.stat().st_size:,} bytes received instead of {notes['total']:,}")


def _unpack(part: Path, staging: Path, name: str) -> None:
    """Unpack weights and logs of a ZIP by their file names, without folders; a single weights file becomes `<name>.pt`."""
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    with part.open("rb") as file:
        start = file.read(9)
    if start.startswith(b"\x80") or start[8:] == b"{":  # torch.save's older format, safetensors
        os.replace(part, staging / f"{name}.pt")
        return
    if not start.startswith(b"PK"):
        raise ShareUnavailable(f"sent neither a ZIP nor weights, but data that begin with {start!r}")
    try:
        with zipfile.ZipFile(part) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
            if sum(info.file_size for info in infos) > max(BOMB_BYTES, BOMB_FACTOR * part.stat().st_size):
                raise ShareUnavailable("sent a ZIP that unpacks to many times its size, as no weights do")
            paths = [PureWindowsPath(info.filename) for info in infos]  # handles both slashes, and drive letters
            names = Counter(path.name for path in paths)
            if "data.pkl" in names:  # a file written by torch.save
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile("wrong checksum")
                os.replace(part, staging / f"{name}.pt")
                return
            for info, path in zip(infos, paths):
                target = staging / (path.name if names[path.name] == 1 else f"{path.parent.name}_{path.name}")
                odd = target.name.startswith(".") or not target.name.isprintable() or target.name.lower() == DIGESTS
                odd = odd or stat.S_ISLNK(info.external_attr >> 16) or target.exists()
                if target.suffix.lower() in (*WEIGHT_SUFFIXES, ".txt", ".log", ".json") and not odd:
                    with archive.open(info) as member, target.open("xb") as file:
                        shutil.copyfileobj(member, file, PIECE)
    except (OSError, UserError):
        raise
    except Exception as error:  # for damaged members, decoders raise nearly any exception
        raise ShareUnavailable(f"sent a ZIP that is damaged or incomplete ({error})") from error
    if not any(staging.iterdir()):
        raise ShareUnavailable("sent a ZIP without weights or logs")
