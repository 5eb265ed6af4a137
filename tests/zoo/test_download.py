"""Downloads from a server on this machine that answers as shares do, well and badly: the files or an error, never half a file."""

from __future__ import annotations

import functools
import hashlib
import http.server
import importlib.util
import io
import json
import re
import resource
import shutil
import stat
import struct
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_url

import zoo.download
from common.errors import UserError
from common.files import LOCK_FILE, sha256
from zoo.download import DIGESTS, ShareUnavailable, download, verify
from zoo.robustbench import import_robustbench, robustbench_entry

PROJECT = Path(__file__).resolve().parents[2]
NOISE = hashlib.shake_256(b"weights").digest(400_000)  # does not compress
FILES = {"robust.pt": NOISE[:250_000], "clean_init.pth": NOISE[250_000:], "aa_linf.txt": b"robust accuracy: 48.6%\n"}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def zipped(files: dict[str, bytes], *, top: str = "ConvNeXt-T/", method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr(top or "empty/", b"")
        for name, content in files.items():
            archive.writestr(top + name, content)
    return stream.getvalue()


# The server


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers)))
        number = min(len(self.server.seen), len(self.server.answers)) - 1
        try:
            self.server.answers[number](self)
        except ConnectionError:  # the client had enough
            self.close_connection = True

    def log_message(self, *args) -> None:
        pass


Answer = Callable[[Handler], None]


class Share:
    """Answers the n-th request with the n-th of `answers`, then with the last; `seen` are the requests' paths and headers."""

    def __init__(self, waits: list[float]) -> None:
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.seen, self.server.answers = self.seen, self.answers = [], []
        self.link = f"http://127.0.0.1:{self.server.server_port}/index.php/s/token"
        self.waits = waits
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()

    def set(self, *answers: Answer) -> None:
        self.answers[:] = answers
        self.seen.clear()
        self.waits.clear()

    def download(self, folder: Path, *answers: Answer, link: str | None = None, **arguments) -> list[Path]:
        self.set(*answers)
        return download(link or self.link, folder, name="net", **arguments)

    def fails(self, folder: Path, *answers: Answer, match: str, error: type = ShareUnavailable, **arguments) -> str:
        """The message of the error, which names the link and what to try, in one paragraph without flags."""
        with pytest.raises(UserError, match=match) as caught:
            self.download(folder, *answers, hint="Some_Id", **arguments)
        message = str(caught.value)
        assert type(caught.value) is error
        assert "\n" not in message and " --" not in message
        assert f"{self.link}/download" in message
        assert message.endswith("ry RobustBench's copy (id Some_Id), another link, or the path of a local file.")
        return message


@pytest.fixture
def share(monkeypatch: pytest.MonkeyPatch) -> Iterator[Share]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    waits: list[float] = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", waits.append)
    share = Share(waits)
    yield share
    share.close()


def whole(
    body: bytes,
    *,
    ranges: bool = True,
    length: int | None = -1,
    stop: int | None = None,
    etag: str | None = '"1"',
    then: Callable[[], object] = lambda: None,
    **headers: str,
) -> Answer:
    """The ZIP, or with `ranges` the part of it that was asked for.

    Args:
        length: says so many bytes; None: says nothing, and sends in chunks; -1: the truth.
        stop: the byte of the ZIP before which the connection breaks, after calling `then`.
    """

    def answer(handler: Handler) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        unchanged = handler.headers.get("If-Range") in (None, etag, headers.get("Last-Modified"))
        start = int(asked[1]) if asked and ranges and unchanged else 0
        if start >= len(body):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(body)}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Type", "application/zip")
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if etag is not None:
            handler.send_header("ETag", etag)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        if length is None:
            handler.send_header("Transfer-Encoding", "chunked")
        else:
            handler.send_header("Content-Length", str(len(body) - start if length == -1 else length))
        handler.end_headers()
        sent = body[start:stop]
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(sent), sent) if length is None else sent)
        if stop is not None:
            then()
        if stop is not None or length != -1:
            handler.close_connection = True
        if length is None and stop is None:
            handler.wfile.write(b"0\r\n\r\n")

    return answer


def status(code: int, body: bytes = b"", **headers: str) -> Answer:
    def answer(handler: Handler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


BODY = zipped(FILES)
THIRD = len(BODY) * 3 // 10
LOGIN_PAGE = (
    b"<!DOCTYPE html>\n<html><head><title>\n Login - cloud </title></head><body><input type='password'></body></html>"
)
PAGE = status(200, LOGIN_PAGE, Content_Type="text/html; charset=utf-8")


def check_files(folder: Path, paths: list[Path], files: dict[str, bytes] | None = None) -> None:
    """All files are there and right, and nothing else is."""
    files = FILES if files is None else files
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert there == {*files, DIGESTS, LOCK_FILE}
    assert {name: (folder / name).read_bytes() for name in files} == files
    assert paths == [folder / name for name in sorted(files)]


def check_nothing_final(folder: Path) -> None:
    assert [path.name for path in folder.iterdir() if not path.name.startswith(".")] == [LOCK_FILE]


# What comes right


def test_share_is_unpacked_and_recorded(share: Share, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "net"
    check_files(folder, share.download(folder, whole(BODY)))
    assert json.loads((folder / DIGESTS).read_text()) == {share.link: {k: digest(v) for k, v in sorted(FILES.items())}}
    assert [path for path, _ in share.seen] == ["/index.php/s/token/download"]
    assert share.waits == []


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("top", ["", "ViT-S + ConvStem, ü/", "a/b/"])
def test_layouts_of_zips(share: Share, tmp_path: Path, method: int, top: str) -> None:
    check_files(tmp_path, share.download(tmp_path, whole(zipped(FILES, top=top, method=method))))


def test_only_weights_and_logs_are_taken(share: Share, tmp_path: Path) -> None:
    others = {"README.md": b"x", "run.py": b"x", "pt": b"x", ".hidden.pt": b"x", "._robust.pt": b"x", DIGESTS: b"{}"}
    check_files(tmp_path, share.download(tmp_path, whole(zipped(FILES | others))))


def test_files_of_one_name_get_their_folders_too(share: Share, tmp_path: Path) -> None:
    body = zipped({"robust/model.bin": b"r", "init/model.bin": b"i", "log.txt": b"l"})
    check_files(
        tmp_path,
        share.download(tmp_path, whole(body)),
        {"robust_model.bin": b"r", "init_model.bin": b"i", "log.txt": b"l"},
    )


TORCH = zipped({"data.pkl": b"", "version": b"3\n", "data/0": NOISE}, top="archive/")


@pytest.mark.parametrize("content", [TORCH, b"\x80\x02old pickle", struct.pack("<Q", 2) + b"{}"])
def test_share_of_a_single_file(share: Share, tmp_path: Path, content: bytes) -> None:
    check_files(tmp_path, share.download(tmp_path, whole(content)), {"net.pt": content})


def test_finished_share_is_not_downloaded_again(share: Share, tmp_path: Path) -> None:
    first = share.download(tmp_path, whole(BODY))
    assert share.download(tmp_path, status(500), known={"robust.pt": digest(FILES["robust.pt"])}) == first
    assert share.seen == []


def test_missing_file_is_downloaded_again(share: Share, tmp_path: Path) -> None:
    share.download(tmp_path, whole(BODY))
    (tmp_path / "robust.pt").unlink()
    check_files(tmp_path, share.download(tmp_path, whole(BODY)))


def test_no_length(share: Share, tmp_path: Path) -> None:
    check_files(tmp_path, share.download(tmp_path, whole(BODY, ranges=False, length=None, etag=None)))


def test_progress_is_shown(share: Share, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    share.download(tmp_path, whole(BODY, stop=THIRD), whole(BODY))
    shown = capsys.readouterr()
    assert shown.out == "" and "net: 100%" in shown.err


def test_break_is_continued(share: Share, tmp_path: Path) -> None:
    check_files(tmp_path, share.download(tmp_path, whole(BODY, stop=THIRD), whole(BODY)))
    (_, first), (_, second) = share.seen
    assert "Range" not in first
    start = int(second["Range"].removeprefix("bytes=").removesuffix("-"))
    assert 0 < start <= THIRD and THIRD - start < 1 << 16
    assert second["If-Range"] == '"1"'


@pytest.mark.parametrize("second", [{"ranges": False}, {"etag": None}])
def test_break_without_ranges_starts_over(share: Share, tmp_path: Path, second: dict) -> None:
    """Also where nothing tells two versions of the file apart."""
    first = {"etag": None} | second
    check_files(tmp_path, share.download(tmp_path, whole(BODY, stop=THIRD, **first), whole(BODY, **second)))


@pytest.mark.parametrize("length", [None, -1])
def test_many_breaks_are_no_failure_while_it_goes_on(share: Share, tmp_path: Path, length: int | None) -> None:
    stops = [whole(BODY, stop=at, length=length) for at in range(66_000, len(BODY), 66_000)]
    assert len(stops) > 5
    check_files(tmp_path, share.download(tmp_path, *stops, whole(BODY)))
    assert len(share.seen) == len(stops) + 1


def test_download_is_continued_by_a_later_call(share: Share, tmp_path: Path) -> None:
    message = share.fails(tmp_path, whole(BODY, stop=2 * THIRD), status(503), match="bytes are kept")
    check_nothing_final(tmp_path)
    kept = int(re.search(r"([\d,]+) bytes are kept", message)[1].replace(",", ""))
    check_files(tmp_path, share.download(tmp_path, whole(BODY)))
    assert kept > THIRD and [headers.get("Range") for _, headers in share.seen] == [f"bytes={kept}-"]


def test_part_of_another_link_is_not_continued(share: Share, tmp_path: Path) -> None:
    share.fails(tmp_path, whole(BODY, stop=THIRD), status(503), match="are kept")
    check_files(tmp_path, share.download(tmp_path, whole(BODY), link=f"{share.link}2"))
    assert "Range" not in share.seen[0][1]


@pytest.mark.parametrize("notes", [None, "{", "{}"])
def test_part_without_its_notes_is_not_continued(share: Share, tmp_path: Path, notes: str | None) -> None:
    (tmp_path / ".net.part").write_bytes(b"x" * 100)
    if notes is not None:
        (tmp_path / ".net.json").write_text(notes)
    check_files(tmp_path, share.download(tmp_path, whole(BODY)))
    assert "Range" not in share.seen[0][1]


OTHER_BODY = zipped({**FILES, "robust.pt": FILES["robust.pt"][::-1]})


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"etag": '"1"'}, {"etag": '"2"'}),
        ({"etag": None, "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}, {"etag": None, "Last-Modified": "now"}),
        ({"etag": 'W/"1"', "Last-Modified": "then"}, {"etag": 'W/"1"', "Last-Modified": "now"}),
    ],
)
def test_file_that_changed_meanwhile_starts_over(share: Share, tmp_path: Path, first: dict, second: dict) -> None:
    share.download(tmp_path, whole(BODY, stop=THIRD, **first), whole(OTHER_BODY, **second))
    assert (tmp_path / "robust.pt").read_bytes() == FILES["robust.pt"][::-1]
    assert len(share.seen) == 2
    assert share.seen[1][1]["If-Range"] in (first["etag"], first.get("Last-Modified"))


def test_server_that_ignores_if_range_is_noticed(share: Share, tmp_path: Path) -> None:
    def careless(handler: Handler) -> None:
        del handler.headers["If-Range"]
        whole(OTHER_BODY, etag='"2"')(handler)

    share.download(tmp_path, whole(BODY, stop=THIRD), careless, careless)
    assert (tmp_path / "robust.pt").read_bytes() == FILES["robust.pt"][::-1]
    assert "Range" in share.seen[1][1] and "Range" not in share.seen[2][1]


@pytest.mark.parametrize("content_range", ["bytes 0-{last}/{total}", "rubbish", None])
def test_answer_with_another_range_starts_over(share: Share, tmp_path: Path, content_range: str | None) -> None:
    def answer(handler: Handler) -> None:
        start = int(handler.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        text = (content_range or "").format(start=start, last=len(BODY) - 1, total=len(BODY))
        status(206, BODY[start:], **({"Content-Range": text} if content_range else {}))(handler)

    check_files(tmp_path, share.download(tmp_path, whole(BODY, stop=THIRD), answer, whole(BODY)))
    assert "Range" not in share.seen[-1][1]


def test_answer_that_ends_before_the_announced_length_is_continued(share: Share, tmp_path: Path) -> None:
    def a_bit(handler: Handler) -> None:
        start = int(handler.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        text = f"bytes {start}-{start + 99_999}/{len(BODY)}"
        status(206, BODY[start : start + 100_000], **{"Content-Range": text})(handler)

    check_files(tmp_path, share.download(tmp_path, whole(BODY, stop=THIRD), a_bit, whole(BODY)))
    assert len(share.seen) == 3


def test_force_begins_anew(share: Share, tmp_path: Path) -> None:
    share.fails(tmp_path, whole(BODY, stop=THIRD), status(503), match="are kept")
    check_files(tmp_path, share.download(tmp_path, whole(BODY), force=True))
    assert "Range" not in share.seen[0][1]


def test_answer_of_no_more_bytes_starts_over(share: Share, tmp_path: Path) -> None:
    refusal = status(416, **{"Content-Range": "bytes */5"})
    check_files(tmp_path, share.download(tmp_path, whole(BODY, stop=THIRD), refusal, whole(BODY)))
    assert "Range" not in share.seen[2][1]


@pytest.mark.parametrize("code", [500, 502, 503, 504, 429, 408])
def test_passing_errors_are_retried_with_growing_waits(share: Share, tmp_path: Path, code: int) -> None:
    check_files(tmp_path, share.download(tmp_path, *[status(code)] * 4, whole(BODY)))
    assert share.waits == [2.0, 4.0, 8.0]


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_moved_link_is_followed_also_when_going_on(share: Share, tmp_path: Path, code: int) -> None:
    moved = status(code, Location="/public.php/dav/files/token/?accept=zip")
    check_files(tmp_path, share.download(tmp_path, moved, whole(BODY, stop=THIRD), moved, whole(BODY)))
    assert share.seen[3][0].startswith("/public.php") and "Range" in share.seen[3][1]


@pytest.mark.parametrize("end", ["/", "/download"])
def test_spellings_of_a_link(share: Share, tmp_path: Path, end: str) -> None:
    check_files(tmp_path, share.download(tmp_path, whole(BODY), link=share.link + end))
    assert share.seen[0][0] == "/index.php/s/token/download"


def test_two_at_a_time_download_once(share: Share, tmp_path: Path) -> None:
    """The second waits for the first, and then finds all done."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(handler: Handler) -> None:
        begun.set()
        go_on.wait(60)
        whole(BODY)(handler)

    share.set(slow)
    code = "import sys; from pathlib import Path; from zoo.download import download; "
    code += "download(sys.argv[1], Path(sys.argv[2]), name='net')"
    command = [sys.executable, "-c", code, share.link, str(tmp_path)]
    first = subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.DEVNULL)
    assert begun.wait(60)
    second = subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True)
    assert "waiting for another process" in second.stderr.readline()
    go_on.set()
    assert (first.wait(60), second.wait(60), len(share.seen)) == (0, 0, 1)
    second.stderr.close()
    check_files(tmp_path, [tmp_path / name for name in sorted(FILES)])


# What is an error


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (status(404, b"<html>no such page</html>"), "does not exist .status 404 "),
        (status(410), "was removed .status 410 "),
        (status(403), "is not public .status 403 "),
        (status(401), "requires a login .status 401 "),
        (status(418), "gave no file .status 418 "),
        (PAGE, "sent a web page: the file was moved, requires a login, or its quota is exceeded"),
        (status(200, b"\n <html>closed", Content_Type="application/zip"), "neither a ZIP nor weights.*<html>"),
        (status(200, BODY, Content_Type="text/html"), "sent a web page"),
        (status(200, b'{"ocs": 1}', Content_Type="application/json"), r"neither a ZIP nor weights.*\{\"ocs\": "),
        (status(200, b"PK??", Content_Type="application/zip"), "damaged or incomplete"),
        (status(200, zipped({}, top="")), "ZIP without weights or logs"),
        (status(200, zipped({"README.md": b""})), "ZIP without weights or logs"),
        (status(302, Location="ftp://127.0.0.1/"), "not a valid URL of a web server"),
        (status(302, Location="http://[/"), "not a valid URL of a web server"),
    ],
)
def test_answers_that_are_final(share: Share, tmp_path: Path, answer: Answer, match: str) -> None:
    share.fails(tmp_path, answer, match=match)
    check_nothing_final(tmp_path)
    assert (len(share.seen), share.waits) == (1, [])


def test_final_answer_to_a_later_part_of_the_file_keeps_the_part(share: Share, tmp_path: Path) -> None:
    share.fails(tmp_path, whole(BODY, stop=THIRD), PAGE, match="web page")
    check_files(tmp_path, share.download(tmp_path, whole(BODY)))
    assert "Range" in share.seen[0][1]


@pytest.mark.parametrize(("answer", "match"), [(PAGE, "web page.* requires a login"), (status(401), "login .*/login")])
def test_redirect_to_a_login_page(share: Share, tmp_path: Path, answer: Answer, match: str) -> None:
    share.fails(tmp_path, status(302, Location="/index.php/login?redirect_url=/s/token"), answer, match=match)


def test_redirect_to_what_is_not_there_names_it(share: Share, tmp_path: Path) -> None:
    share.fails(tmp_path, status(301, Location="/new"), status(404), match=r"status 404 of http://[\d.:]+/new\)")


def test_redirect_loop(share: Share, tmp_path: Path) -> None:
    share.fails(tmp_path, status(302, Location="/index.php/s/token/download"), match="redirects")


def test_gives_up_after_so_many_attempts(share: Share, tmp_path: Path) -> None:
    share.fails(tmp_path, status(503), match="failed repeatedly: status 503")
    assert (len(share.seen), share.waits) == (5, [2, 4, 8])


def test_length_too_long(share: Share, tmp_path: Path) -> None:
    share.fails(tmp_path, whole(BODY, ranges=False, length=len(BODY) + 9), match="failed repeatedly.*9 more")
    assert len(share.seen) > 1
    check_nothing_final(tmp_path)


@pytest.mark.parametrize("length", [THIRD, None])
def test_truncated_zip(share: Share, tmp_path: Path, length: int | None) -> None:
    """With the length it was cut to, or with none: only the ZIP itself tells."""
    share.fails(tmp_path, whole(BODY[:THIRD], length=length), match="damaged or incomplete")
    check_nothing_final(tmp_path)
    assert not (tmp_path / ".net.part").exists()
    check_files(tmp_path, share.download(tmp_path, whole(BODY)))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("files", [FILES, {"data.pkl": NOISE}])
def test_wrong_byte_in_a_member(share: Share, tmp_path: Path, method: int, files: dict[str, bytes]) -> None:
    body = bytearray(zipped(files, method=method))
    body[1000] ^= 1
    share.fails(tmp_path, whole(bytes(body)), match="damaged or incomplete")
    check_nothing_final(tmp_path)


@pytest.mark.parametrize("stop", [0, THIRD])
def test_slow_server(share: Share, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    """No byte within the time: at the start, or in the middle; the bytes before are kept."""
    monkeypatch.setattr(zoo.download, "TIMEOUT", 0.2)
    end = threading.Event()
    stuck = whole(BODY, stop=stop, then=lambda: end.wait(20))
    try:
        share.fails(tmp_path, stuck, match="failed repeatedly: .*timed out")
    finally:
        end.set()
    assert len(share.seen) in (5, 6)
    check_nothing_final(tmp_path)
    monkeypatch.undo()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    check_files(tmp_path, share.download(tmp_path, whole(BODY)))
    assert ("Range" in share.seen[0][1]) == (stop > 0)


@pytest.mark.parametrize(
    ("link", "match"),
    [
        ("http://127.0.0.1:1/s/token", "http://127.0.0.1:1/s/token/download failed .*refused.* Try another"),
        ("http://share.invalid/s/token", "Name or service not known|resol|name resolution"),
        *[
            (link, "not a valid URL of a web server")
            for link in ("token", "file:///etc/passwd", "https://", "http://[::1/s")
        ],
    ],
)
def test_no_server(share: Share, tmp_path: Path, link: str, match: str) -> None:
    with pytest.raises(ShareUnavailable, match=match):
        share.download(tmp_path, whole(BODY), link=link)


# Members


def special(name: str, mode: int = 0o100644, content: bytes = b"x") -> bytes:
    """A ZIP with a good file, and one of this name and mode."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("robust.pt", b"good")
        info = zipfile.ZipInfo("placeholder")
        info.filename, info.create_system, info.external_attr = name, 3, mode << 16
        archive.writestr(info, content)
    return stream.getvalue()


@pytest.mark.parametrize("way", ["../", "a/../../", "/", "\\", "..\\", "C:/", "c:", "a//", "./", "a\\"])
def test_members_that_lead_elsewhere_stay_in_the_folder(share: Share, tmp_path: Path, way: str) -> None:
    folder = tmp_path / "in" / "net"
    check_files(
        folder, share.download(folder, whole(special(f"{way}evil.pt"))), {"robust.pt": b"good", "evil.pt": b"x"}
    )
    assert all(path.is_relative_to(folder) for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "name", ["..", "//host/evil.pt", "a\nb.pt", "evil.pt/", "x/.pt", f"a/{DIGESTS}", DIGESTS.upper()]
)
def test_members_that_cannot_be_files_are_left_out(share: Share, tmp_path: Path, name: str) -> None:
    content = b"" if name.endswith("/") else b"x"
    check_files(tmp_path, share.download(tmp_path, whole(special(name, content=content))), {"robust.pt": b"good"})


@pytest.mark.parametrize("other", ["../../../evil.pt", "/evil.pt"])
def test_member_with_another_name_in_an_extra_field(share: Share, tmp_path: Path, other: str) -> None:
    """Python takes that one from 3.12 on, and leaves it as it is."""
    stream, info = io.BytesIO(), zipfile.ZipInfo("robust.pt")
    field = struct.pack("<BL", 1, zlib.crc32(info.filename.encode())) + other.encode()
    info.extra = struct.pack("<HH", 0x7075, len(field)) + field
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(info, b"good")
    folder = tmp_path / "a" / "b" / "net"
    (path,) = share.download(folder, whole(stream.getvalue()))
    assert path.read_bytes() == b"good" and path.name in ("robust.pt", "evil.pt")
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {folder}


def test_links_are_left_out(share: Share, tmp_path: Path) -> None:
    body = special("link.pt", stat.S_IFLNK | 0o777, b"/etc/passwd")
    check_files(tmp_path, share.download(tmp_path, whole(body)), {"robust.pt": b"good"})


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["robust.pt", "/robust.pt"])
def test_duplicate_members_overwrite_nothing(share: Share, tmp_path: Path, name: str) -> None:
    check_files(tmp_path, share.download(tmp_path, whole(special(name))), {"_robust.pt": b"good"})


def test_encrypted_member(share: Share, tmp_path: Path) -> None:
    body = bytearray(special("secret.pt"))
    body[body.rindex(b"PK\x01\x02") + 8] |= 1
    share.fails(tmp_path, whole(bytes(body)), match="damaged or incomplete.*secret.pt.* is encrypted")


@pytest.mark.parametrize("name", ["robust.pt", "data.pkl"])
def test_bomb(share: Share, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(zoo.download, "BOMB_BYTES", 1_000_000)
    share.fails(tmp_path, whole(zipped({name: bytes(1_000_001)}, method=zipfile.ZIP_DEFLATED)), match="many times its")
    check_nothing_final(tmp_path)
    share.download(tmp_path, whole(zipped({"net.pt": bytes(1_000_001)})))  # not compressed


def test_link_in_the_folder_is_not_written_through(share: Share, tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "net"
    outside.write_bytes(b"mine")
    folder.mkdir()
    (folder / "robust.pt").symlink_to(outside)
    check_files(folder, share.download(folder, whole(BODY), force=True))
    assert outside.read_bytes() == b"mine" and not (folder / "robust.pt").is_symlink()


# Digests


CHANGED = {**FILES, "robust.pt": b"other"}


def test_changed_share_is_refused_until_forced(share: Share, tmp_path: Path) -> None:
    share.download(tmp_path, whole(BODY))
    (tmp_path / "robust.pt").unlink()
    message = share.fails(tmp_path, whole(zipped(CHANGED)), error=UserError, match="force the download")
    assert digest(FILES["robust.pt"]) in message and digest(b"other") in message and f"move {tmp_path} away" in message
    assert not (tmp_path / "robust.pt").exists() and not (tmp_path / ".net.part").exists()
    check_files(tmp_path, share.download(tmp_path, whole(zipped(CHANGED)), force=True), CHANGED)


def test_file_that_left_the_share_is_refused(share: Share, tmp_path: Path) -> None:
    share.download(tmp_path, whole(BODY))
    (tmp_path / "robust.pt").unlink()
    left = {name: content for name, content in FILES.items() if name != "robust.pt"}
    share.fails(
        tmp_path, whole(zipped(left)), error=UserError, match="robust.pt with the SHA-256 .none: the file is missing"
    )


def test_file_changed_here_is_refused_until_deleted(share: Share, tmp_path: Path) -> None:
    share.download(tmp_path, whole(BODY))
    (tmp_path / "robust.pt").write_bytes(b"mine")
    with pytest.raises(UserError, match="robust.pt: .* records .*deleting the file") as caught:
        share.download(tmp_path, whole(BODY))
    assert digest(FILES["robust.pt"]) in str(caught.value) and digest(b"mine") in str(caught.value)
    assert (tmp_path / "robust.pt").read_bytes() == b"mine"
    (tmp_path / "robust.pt").unlink()
    check_files(tmp_path, share.download(tmp_path, whole(BODY)))


def test_someone_elses_file_is_not_overwritten(share: Share, tmp_path: Path) -> None:
    (tmp_path / "robust.pt").write_bytes(b"mine")
    share.fails(tmp_path, whole(BODY), error=UserError, match=f"expected {digest(b'mine')}")
    assert (tmp_path / "robust.pt").read_bytes() == b"mine"
    check_files(tmp_path, share.download(tmp_path, whole(BODY), force=True))


def test_known_digests_hold_from_the_start(share: Share, tmp_path: Path) -> None:
    known = {"robust.pt": digest(FILES["robust.pt"])}
    message = share.fails(tmp_path, whole(zipped(CHANGED)), known=known, force=True, error=UserError, match="robust.pt")
    assert known["robust.pt"] in message and digest(b"other") in message
    check_nothing_final(tmp_path)
    elsewhere = {"elsewhere.pt": "0" * 64}
    share.fails(tmp_path, whole(BODY), known=elsewhere, error=UserError, match="elsewhere.pt.*missing")
    check_files(tmp_path, share.download(tmp_path, whole(BODY), known=known))
    share.fails(tmp_path, whole(BODY), known={"robust.pt": "0" * 64}, error=UserError, match="expected 0000")


def test_moved_share_with_the_same_content(share: Share, tmp_path: Path) -> None:
    share.download(tmp_path, whole(BODY))
    moved = f"{share.link}2"
    check_files(tmp_path, share.download(tmp_path, whole(BODY), link=moved))
    assert list(json.loads((tmp_path / DIGESTS).read_text())) == [moved]
    with pytest.raises(UserError, match="expected [0-9a-f]{64}"):
        share.download(tmp_path, whole(zipped(CHANGED)), link=f"{share.link}3")


@pytest.mark.parametrize("content", ["{", "[]", '{"link": 1}'])
def test_broken_record(share: Share, tmp_path: Path, content: str) -> None:
    (tmp_path / DIGESTS).write_text(content)
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path / DIGESTS))}.*expected"):
        share.download(tmp_path, whole(BODY))


def test_verify(share: Share, tmp_path: Path) -> None:
    share.download(tmp_path, whole(BODY))
    for name in FILES:
        text = verify(tmp_path / name)
        assert text.startswith(digest(FILES[name])) and text.endswith(f"agrees with {tmp_path / DIGESTS}")
    assert verify(tmp_path).splitlines() == [verify(tmp_path / name) for name in sorted(FILES)]
    other = tmp_path / "other.pt"
    other.write_bytes(b"x")
    assert verify(other) == f"{digest(b'x')}  {other}: not recorded in {tmp_path / DIGESTS}"
    (tmp_path / "robust.pt").write_bytes(b"x")
    with pytest.raises(UserError, match=f"records the SHA-256 {digest(FILES['robust.pt'])}, .* has {digest(b'x')}"):
        verify(tmp_path / "robust.pt")


def test_verify_needs_something_to_verify(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(UserError, match=f"{path}: expected a file, or a folder that contains {DIGESTS}"):
            verify(path)


# The disk


@pytest.fixture
def make_room() -> Iterator[Callable[[], None]]:
    """No file can grow beyond 200,000 bytes, until this is called."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_while_downloading_keeps_the_part(
    share: Share, tmp_path: Path, make_room: Callable[[], None]
) -> None:
    with pytest.raises(
        UserError, match="net: cannot write to .*File too large.*the downloaded part is kept. Free space"
    ):
        share.download(tmp_path, whole(BODY))
    check_nothing_final(tmp_path)
    assert (tmp_path / ".net.part").read_bytes() == BODY[:200_000]
    make_room()
    check_files(tmp_path, share.download(tmp_path, whole(BODY)))
    assert share.seen[0][1]["Range"] == "bytes=200000-"


def test_full_disk_while_unpacking_keeps_the_zip(share: Share, tmp_path: Path, make_room: Callable[[], None]) -> None:
    files = {"robust.pt": b"\0" * 300_000}
    body = zipped(files, method=zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="Free space"):
        share.download(tmp_path, whole(body))
    check_nothing_final(tmp_path)
    assert not (tmp_path / ".net.files").exists()
    make_room()
    check_files(tmp_path, share.download(tmp_path, status(500)), files)
    assert share.seen == []


def test_folder_that_cannot_be_made(share: Share, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="net: cannot write to .*file/net .*try another folder"):
        share.download(tmp_path / "file" / "net", whole(BODY))


# Memory


class Unseekable(io.RawIOBase):
    """The answer's body as a file that only grows, sent in chunks."""

    def __init__(self, handler: Handler) -> None:
        self._write = handler.wfile.write

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        if len(data):
            self._write(b"%x\r\n%s\r\n" % (len(data), bytes(data)))
        return len(data)


def made_while_sent(megabytes: int) -> Answer:
    """A stored ZIP of zeros of unknown length, as Nextcloud sends its own."""

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        with zipfile.ZipFile(Unseekable(handler), "w") as archive, archive.open("net/robust.pt", "w") as member:
            for _ in range(megabytes):
                member.write(bytes(1 << 20))
        handler.wfile.write(b"0\r\n\r\n")

    return answer


PEAK = """
import sys
from pathlib import Path
from zoo.download import download
def peak():  # of this process alone: getrusage counts the one it was started from
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
before = peak()
files = download(sys.argv[1], Path(sys.argv[2]), name="net")
print(peak() - before, files[0].stat().st_size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("megabytes", [64, pytest.param(400, marks=pytest.mark.slow)])
def test_memory_of_a_download_does_not_grow_with_it(share: Share, tmp_path: Path, megabytes: int) -> None:
    share.answers[:] = [made_while_sent(megabytes)]
    command = [sys.executable, "-c", PEAK, share.link, str(tmp_path / "net")]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120)
    shutil.rmtree(tmp_path / "net")
    assert result.returncode == 0, result.stderr
    growth, size = map(float, result.stdout.split())
    print(f"{growth=:.1f} MB")
    assert size == megabytes << 20
    assert growth < 40


# RobustBench


ID = "Singh2023Revisiting_ConvNeXt-T-ConvStem"
GDRIVE_ID = "1-FjtOF6LJ3-bf4VezsmWwncCxYSx-USP"


@pytest.fixture
def drive(share: Share, monkeypatch: pytest.MonkeyPatch) -> Share:
    """In place of Google Drive."""
    monkeypatch.setattr(zoo.download, "GOOGLE_DRIVE", f"{share.link}?id=")
    return share


def robustbench_copy(name: str, folder: Path, **options: bool) -> Path:
    return download(f"robustbench:{name}", folder, name=name, **options)[0]


def test_robustbench_copy(drive: Share, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    drive.set(whole(TORCH, stop=THIRD), whole(TORCH))
    path = robustbench_copy(ID, folder)
    check_files(folder, [path], {f"{ID}.pt": TORCH})
    assert "agrees" in verify(path)
    assert robustbench_copy(ID, folder) == path
    assert [asked for asked, _ in drive.seen] == [f"/index.php/s/token?id={GDRIVE_ID}"] * 2

    path.write_bytes(b"changed here")
    with pytest.raises(UserError, match=digest(TORCH)):
        robustbench_copy(ID, folder)
    path.unlink()
    other = zipped({"data.pkl": b"other"})
    drive.set(whole(other))
    with pytest.raises(UserError, match=f"{digest(other)}.*{digest(TORCH)}.*force"):
        robustbench_copy(ID, folder)
    assert not path.exists()
    assert sha256(robustbench_copy(ID, folder, force=True)) == digest(other)


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (status(200, b"<html>quota exceeded", Content_Type="text/html"), "quota is exceeded.*Try another link"),
        (status(200, b"<html>quota exceeded"), "neither a ZIP nor weights.*<html>"),
        (status(503), "status 503"),
    ],
)
def test_robustbench_copy_that_cannot_be_had(drive: Share, tmp_path: Path, answer: Answer, match: str) -> None:
    drive.set(answer)
    with pytest.raises(UserError, match=f"{ID}: .*{match}"):
        robustbench_copy(ID, tmp_path)
    check_nothing_final(tmp_path)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("Singh2023Revisiting_ConvNeXt-T", ID),
        ("x", "there are .*Wong2020Fast"),
        ("Standard_R50", "stored elsewhere"),
        ("Debenedetti2022Light_XCiT-S12", "stored elsewhere"),
        ("Bai2024MixedNUTS", "ensemble"),
    ],
)
def test_robustbench_ids_that_have_no_copy(tmp_path: Path, name: str, match: str) -> None:
    for use in (robustbench_entry, lambda name: robustbench_copy(name, tmp_path)):
        with pytest.raises(UserError, match=match):
            use(name)


@pytest.mark.parametrize(
    ("link", "address"),
    [
        ("hub:UCSC-VLAA/AdvXL-ViT-H14:advxl_vit_h14.pth", "/UCSC-VLAA/AdvXL-ViT-H14/resolve/main/advxl_vit_h14.pth"),
        ("drive:1GOqjNsRQM", "/index.php/s/token?id=1GOqjNsRQM"),
        ("{server}/ckpt/ARES_ResNet50_AT.pth", "/ckpt/ARES_ResNet50_AT.pth"),
    ],
)
def test_single_files_of_others(
    drive: Share, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: str, address: str
) -> None:
    server = drive.link.removesuffix("/index.php/s/token")
    monkeypatch.setattr(zoo.download, "hf_hub_url", functools.partial(hf_hub_url, endpoint=server))
    drive.set(whole(TORCH, stop=THIRD), whole(TORCH))
    paths = download(link.format(server=server), tmp_path / "new", name="net")
    check_files(tmp_path / "new", paths, {"net.pt": TORCH})
    assert [asked for asked, _ in drive.seen] == [address] * 2  # continued


def test_robustbench_architecture_is_robustbenchs() -> None:
    model = robustbench_entry(ID)["model"]()
    assert type(model).__module__.startswith(("robustbench", "timm"))
    assert sum(p.numel() for p in model.parameters()) == 28_627_432


def test_the_name_that_robustbench_imports_autoattack_by_is_taken_back() -> None:
    """Here or in an earlier test: the real package is imported once a process."""
    installed = importlib.util.find_spec("autoattack") is not None
    assert import_robustbench().benchmark.__name__ == "benchmark"
    assert any(name.split(".")[0] == "autoattack" for name in sys.modules) == installed


def test_robustbench_finds_autoattack_by_its_name_only_while_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "robustbench.py").write_text("import autoattack, autoattack.state\nfound = autoattack.__name__\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "robustbench", None)  # so that monkeypatch puts back what was there, or nothing
    del sys.modules["robustbench"]
    installed = importlib.util.find_spec("autoattack") is not None
    assert import_robustbench().found == ("autoattack" if installed else "pyautoattack")
    assert any(name.split(".")[0] == "autoattack" for name in sys.modules) == installed


def test_robustbench_that_is_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "robustbench", None)
    with pytest.raises(UserError, match="RobustBench cannot be imported.*pip install robustbench pyautoattack"):
        import_robustbench()
    if importlib.util.find_spec("autoattack") is None:
        assert not any(name.split(".")[0] == "autoattack" for name in sys.modules)
