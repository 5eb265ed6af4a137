"""Shards: written from a folder, read by index, as a stream, and over HTTP."""

from __future__ import annotations

import errno
import functools
import http.server
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data.prepare
from common.errors import UserError
from data.datasets import open_source
from data.decoding import decode
from data.loader import EvalLoader, TrainLoader
from data.shards import ShardSource
from data.source import Source, StreamSource
from tests.data import encoded, write_folder
from tests.helpers.processes import in_a_child

PER_SHARD = 4


def prepare(images: object, folder: Path, *options: str) -> int:
    argv = [str(images), str(folder), f"--per-shard={PER_SHARD}", "--workers=0", *options]
    return data.prepare.main(argv)


def opened(folder: object, split: str = "train", **options: object) -> Source | StreamSource:
    return open_source(f"wds/{folder}", split=split, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock" and path.name != "lock"}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_folder(tmp_path / "images", {"a": 5, "b": 6, "c": 7})
    (tmp_path / "images" / "b" / "large.jpg").write_bytes(encoded(50, 200, 120, "JPEG"))
    (tmp_path / "images" / "b" / "._large.jpg").write_bytes(b"of macOS, no image")
    return tmp_path / "images"


@pytest.fixture
def shards(images: Path, tmp_path: Path) -> Path:
    assert prepare(images, tmp_path / "shards") == 0
    return tmp_path / "shards"


def unfinish(shards: Path) -> None:
    """Restore the state of a command that was interrupted before its last step."""
    manifest = shards / "train.manifest.json"
    (shards / "train.begun.json").write_text(json.dumps(json.loads(manifest.read_text())["made_from"]))
    manifest.unlink()


class TestPrepare:
    def test_holds_the_folders_files_byte_by_byte(self, images: Path, shards: Path) -> None:
        plain, found = open_source(str(images), split="train"), opened(shards)
        assert isinstance(found, ShardSource) and found.class_names == plain.class_names == ["a", "b", "c"]
        expected = {plain.key(i): plain.read(i) for i in range(len(plain))}
        assert {found.key(i): found.read(i) for i in range(len(found))} == expected
        assert json.loads((shards / "train.manifest.json").read_text())["left_out"] == []
        order = [found.key(i) for i in range(len(found))]
        assert order != sorted(order) and len(list(shards.glob("*.tar"))) == 5  # shuffled
        assert found.size(3) == len(found.image(3)) and order[3] in found.name(3)
        assert not list(shards.glob("*.record.json")) and not list(shards.glob("*.begun.json"))

    def test_resumes_where_it_was_interrupted(
        self, images: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Killed in its third shard, after a damaged one: the result has the same bytes, and complete shards are not rewritten."""
        add, calls, other = data.prepare._add, [], tmp_path / "other"

        def killed(*arguments: object) -> None:
            calls.append(1)
            if len(calls) == 2 * (2 * PER_SHARD + 1):
                raise KeyboardInterrupt
            add(*arguments)

        monkeypatch.setattr(data.prepare, "_add", killed)
        assert prepare(images, other) == 130
        (other / ".train-00002.tar.x.part").touch()  # as of a process that was killed
        assert sorted(path.name for path in other.glob("*.tar")) == ["train-00000.tar", "train-00001.tar"]
        assert isinstance(pytest.raises(UserError, opened, other).value, UserError)  # not ready yet
        (other / "train-00001.tar").write_bytes(b"cut off")
        before = (other / "train-00000.tar").stat().st_mtime_ns
        assert prepare(images, other) == 0
        assert (other / "train-00000.tar").stat().st_mtime_ns == before
        assert contents(other) == contents(shards)  # and no other file
        assert prepare(images, other) == 0 and contents(other) == contents(shards)  # nothing left to do

    def test_several_workers_write_the_same(self, images: Path, shards: Path, tmp_path: Path) -> None:
        assert prepare(images, tmp_path / "other", "--workers=2") == 0
        assert contents(tmp_path / "other") == contents(shards)

    def test_faults_of_workers_are_one_sentence(
        self, images: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
    ) -> None:
        def full(path: Path, write: object) -> None:
            if path.name != "train.begun.json":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write_atomically(path, write)

        other = tmp_path / "other"
        write_atomically = data.prepare.write_atomically
        with monkeypatch.context() as patch:
            patch.setattr(data.prepare, "write_atomically", full)
            assert prepare(images, other, "--workers=1") == 2
        assert capsys.readouterr().err.endswith(f"error: FOLDER: cannot write to {other} (No space left on device).\n")
        with monkeypatch.context() as patch:
            patch.setattr(data.prepare, "_add", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            status, said = in_a_child(lambda: (prepare(images, other, "--workers=1"), capsys.readouterr().err))
        assert status == 2
        error = said.splitlines()[-1]
        assert "DataLoader worker" in error and "Killed" in error and error.endswith("now 1. The same command resumes.")
        assert prepare(images, other) == 0 and contents(other) == contents(shards)

    def test_resizes_what_is_larger(self, images: Path, tmp_path: Path) -> None:
        assert prepare(images, tmp_path / "small", "--short-side=40", "--quality=80") == 0
        found = opened(tmp_path / "small")
        sizes = {found.key(i): decode(found.image(i)).size for i in range(len(found))}
        assert sizes.pop("b/large.jpg") == (67, 40) and set(sizes.values()) == {(40, 30)}
        (large,) = (found.image(i) for i in range(len(found)) if found.key(i) == "b/large.jpg")
        expected = np.asarray(Image.open(images / "b" / "large.jpg").resize((67, 40), Image.Resampling.BICUBIC), float)
        assert np.abs(np.asarray(decode(large), float) - expected).mean() < 4 and large[:2] == b"\xff\xd8"

    def test_what_is_no_image_is_skipped_and_listed(
        self, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (images / "a" / "text.jpg").write_bytes(b"404 Not Found")
        (images / "a" / "empty.png").touch()
        assert prepare(images, tmp_path / "shards") == 0
        manifest = json.loads((tmp_path / "shards" / "train.manifest.json").read_text())
        assert sorted(name for name, _ in manifest["left_out"]) == ["a/empty.png", "a/text.jpg"]
        assert manifest["num_samples"] == len(opened(tmp_path / "shards")) == 19
        said = capsys.readouterr()
        assert "skipped: a/text.jpg" in said.err and "2 skipped" in said.out

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_file_that_cannot_be_read_ends_it(self, images: Path, tmp_path: Path, workers: int, capsys) -> None:
        (images / "b" / "003.png").rename(tmp_path / "003.png")
        (images / "b" / "003.png").symlink_to(tmp_path / "unmounted")
        source, folder = open_source(str(images), split="train"), tmp_path / "shards"
        settings = data.prepare.Settings(0, 90, PER_SHARD, 0)
        folder.mkdir()
        with pytest.raises(UserError, match=r"^IMAGES: cannot read .*b/003.png \(No such file or directory\)") as error:
            data.prepare.prepare(source, folder, "train", settings, workers=workers, progress=False)
        assert "Traceback" not in str(error.value) and not (folder / "train.manifest.json").exists()
        assert prepare(images, folder) == 2 and "b/003.png" in capsys.readouterr().err
        (tmp_path / "003.png").rename(tmp_path / "unmounted")
        assert prepare(images, folder) == 0 and len(opened(folder)) == 19

    def test_a_class_without_an_image_is_refused(self, images: Path, tmp_path: Path, capsys) -> None:
        (images / "d").mkdir()
        (images / "d" / "text.jpg").write_bytes(b"404 Not Found")
        assert prepare(images, tmp_path / "shards") == 2
        assert "found none in d (1 skipped in total, such as d/text.jpg: " in capsys.readouterr().err
        (images / "d" / "text.jpg").write_bytes(encoded(9, kind="JPEG"))
        assert prepare(images, tmp_path / "shards") == 0 and len(opened(tmp_path / "shards")) == 20

    def test_says_what_it_will_take(self, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert prepare(images, tmp_path / "shards", "--estimate") == 0
        assert not list((tmp_path / "shards").iterdir())
        assert "19 images in 3 classes: about 0.00 GB" in capsys.readouterr().out
        source = open_source(str(images), split="train")
        expected = data.prepare.estimate(source, data.prepare.Settings(0, 90, PER_SHARD, 0))
        prepare(images, tmp_path / "shards")
        written = sum(path.stat().st_size for path in (tmp_path / "shards").glob("*.tar"))
        assert 0.4 * written < expected.size < written and expected.seconds > 0  # each shard ends with 10 kB of zeros

    def test_too_little_space(self, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
        usage = data.prepare.shutil.disk_usage
        monkeypatch.setattr(data.prepare.shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
        assert prepare(images, tmp_path / "shards") == 2
        assert "FOLDER: about" in capsys.readouterr().err and not list((tmp_path / "shards").glob("*.tar"))

    @pytest.mark.parametrize("finished", [False, True])
    def test_other_images_or_settings_in_one_folder_are_refused(
        self, images: Path, shards: Path, finished: bool, capsys: pytest.CaptureFixture[str]
    ) -> None:
        if not finished:
            unfinish(shards)
        before = contents(shards)
        assert prepare(images, shards, "--short-side=10") == 2
        assert "made from other settings" in capsys.readouterr().err
        (images / "c" / "000.png").unlink()
        assert prepare(images, shards) == 2 and "images (were 19, are 18)" in capsys.readouterr().err
        assert contents(shards) == before

    @pytest.mark.parametrize("finished", [False, True])
    def test_as_many_other_images_are_refused(
        self, images: Path, shards: Path, finished: bool, capsys: pytest.CaptureFixture[str]
    ) -> None:
        if not finished:
            unfinish(shards)
        before = contents(shards)
        (images / "c" / "000.png").rename(images / "a" / "new.png")
        assert prepare(images, shards) == 2
        assert "made from other images: their number is equal" in capsys.readouterr().err and contents(shards) == before

    @pytest.mark.parametrize("below", [".", "shards", "a", "../link/shards"])
    def test_a_folder_among_the_images_is_refused(self, images: Path, below: str, capsys) -> None:
        (images.parent / "link").symlink_to(images)
        before = sorted(images.rglob("*"))
        assert prepare(images, images / below) == 2
        assert "FOLDER: expected a folder outside" in capsys.readouterr().err and sorted(images.rglob("*")) == before

    def test_shards_that_are_missing_or_cut_are_made_again(self, images: Path, shards: Path, capsys) -> None:
        before = contents(shards)
        kept = (shards / "train-00000.tar").stat().st_mtime_ns
        (shards / "train-00002.tar").unlink()
        (shards / "train-00003.tar").write_bytes(b"cut")
        assert prepare(images, shards) == 0 and contents(shards) == before
        assert (shards / "train-00000.tar").stat().st_mtime_ns == kept
        (shards / "train.index.npz").unlink()
        assert prepare(images, shards) == 0 and contents(shards) == before
        for path in images.rglob("*.png"):
            path.write_bytes(encoded(99))
        (shards / "train-00002.tar").unlink()
        before = contents(shards)
        assert prepare(images, shards) == 2 and contents(shards) == before
        assert "train-00002.tar is missing or has another size, and cannot be made again" in capsys.readouterr().err

    def test_both_splits_in_one_folder(self, images: Path, shards: Path, tmp_path: Path) -> None:
        write_folder(tmp_path / "v", {"a": 2, "c": 1})
        assert prepare(tmp_path / "v", shards, "--split=val") == 0
        train = opened(shards)
        val = opened(shards, "val", class_names=train.class_names)
        assert len(train) == 19 and sorted(val.labels.tolist()) == [0, 0, 2]

    def test_labels_of_both_splits_are_the_same_in_a_stream(self, images: Path, shards: Path, tmp_path: Path) -> None:
        pytest.importorskip("webdataset", reason="reads shards without an index")
        write_folder(tmp_path / "v", {"b": 2, "c": 1})
        assert prepare(tmp_path / "v", shards, "--split=val") == 0
        for name in ("validation.manifest.json", "validation.index.npz"):
            (shards / name).unlink()
        (batch,) = EvalLoader(opened(shards, "val"), size=8, batch_size=3)
        assert sorted(batch.y.tolist()) == [1, 1, 2]

    @pytest.mark.parametrize("finished", [False, True])
    def test_splits_of_other_classes_in_one_folder_are_refused(
        self, images: Path, tmp_path: Path, finished: bool, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "shards"
        write_folder(tmp_path / "v", {"b": 2, "c": 1})
        assert prepare(tmp_path / "v", folder, "--split=val") == 0
        if not finished:
            path = folder / "validation.manifest.json"
            (folder / "validation.begun.json").write_text(json.dumps(json.loads(path.read_text())["made_from"]))
            path.unlink()
        before = contents(folder)
        assert prepare(images, folder) == 2 and contents(folder) == before
        assert "contains the split validation with the classes b, c; expected the same" in capsys.readouterr().err
        write_folder(tmp_path / "v", {"d": 1})
        assert prepare(images, tmp_path / "other") == 0
        assert prepare(tmp_path / "v", tmp_path / "other", "--split=val") == 2
        assert "IMAGES: " in (said := capsys.readouterr().err) and "that the training set does not have: d" in said

    @pytest.mark.parametrize("name", ["train.begun.json", "_info.json"])
    @pytest.mark.parametrize("content", ["", "[]", '{"splits": 3}'])
    def test_damaged_files_in_the_folder_are_reported_before_anything_is_written(
        self, images: Path, tmp_path: Path, name: str, content: str, capsys
    ) -> None:
        (tmp_path / "shards").mkdir()
        (tmp_path / "shards" / name).write_text(content)
        assert prepare(images, tmp_path / "shards") == 2
        said, other = capsys.readouterr().err, str(tmp_path / "shards") + " contains shards made from other"
        assert f"shards/{name}" in said or other in said
        assert contents(tmp_path / "shards") == {name: content.encode()}

    def test_verify_reports_what_is_in_no_manifest(self, images: Path, shards: Path, tmp_path: Path, capsys) -> None:
        (shards / "train-00005.tar").write_bytes(b"")
        (shards / "validation.begun.json").write_text("{}")
        assert data.prepare.main(["--verify", str(shards)]) == 1
        assert "written: train-00005.tar (not in the manifest), validation (not finished)." in capsys.readouterr().out

    def test_verify(self, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert data.prepare.main(["--verify", str(shards)]) == 0
        path = shards / "train-00002.tar"
        content = bytearray(path.read_bytes())
        content[700] ^= 1
        path.write_bytes(content)
        assert data.prepare.main(["--verify", str(shards)]) == 1
        assert "train-00002.tar" in capsys.readouterr().out
        assert data.prepare.main(["--verify", str(tmp_path)]) == 2

    @pytest.mark.parametrize(
        "argv",
        [
            ["x"],
            ["x", ""],
            ["--verify", ""],
            ["--verify", "x", "y"],
            ["x", "y", "--per-shard=0"],
            ["x", "y", "--quality=300"],
            ["x", "y", f"--seed={2**32}"],
            ["x", "y", "--split=test"],
        ],
    )
    def test_wrong_command_lines(self, argv: list[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            data.prepare.main(argv)
        assert ended.value.code == 2


class TestReading:
    def test_trains_as_the_folder_would_with_any_number_of_workers(self, shards: Path) -> None:
        source = opened(shards)
        options = {"augmentation": 1, "batch_size": 3}
        whole = list(TrainLoader(source, **options).epoch(2, 16))
        again = TrainLoader(opened(shards), **options, num_workers=2)
        assert again.repeatable_for_any_workers
        for a, b in zip(again.epoch(2, 16, 2), whole[2:], strict=True):
            assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and torch.equal(a.index, b.index)

    def test_shards_that_are_missing_cut_or_elsewhere(self, shards: Path) -> None:
        (shards / "train-00001.tar").unlink()
        (shards / "train-00003.tar").write_bytes(b"cut")
        with pytest.raises(UserError, match=r"expected the 5 shards.*train-00001.tar, train-00003.tar"):
            opened(shards)

    @pytest.mark.parametrize(
        "change",
        [
            {"format": 99},
            {"num_classes": 2},
            {"class_names": ["a"]},
            {"class_names": list("abcde")},
            {"class_names": 5},
            {"num_samples": "x"},
            {"shards": ["train-00000.tar"]},
            {"shards": [{"name": "../x.tar", "sha256": "", "bytes": 1, "samples": 19}]},
            {"shards": [{"name": "x.tar", "bytes": 1}]},
            {"made_from": None},
            "one shard less",
            "one shard less, as many images",
            [],
            {"only": "format"},
        ],
    )
    def test_damaged_manifest(self, images: Path, shards: Path, change: object, capsys) -> None:
        path = shards / "train.manifest.json"
        manifest = json.loads(written := path.read_bytes())
        (shards.parent / "x.tar").write_bytes(b"x")
        if isinstance(change, str):
            *manifest["shards"], last = manifest["shards"]
            manifest["shards"][0]["samples"] += last["samples"] if "images" in change else 0
        elif change == {"only": "format"}:
            manifest = {"format": 1}
        else:
            manifest = manifest | change if change else change
        path.write_text(json.dumps(manifest))
        with pytest.raises(UserError, match="train"):
            opened(shards)
        before = contents(shards)
        if change == "one shard less, as many images":
            assert prepare(images, shards) == 0 and contents(shards)["train.manifest.json"] == written
        else:
            assert prepare(images, shards) == data.prepare.main(["--verify", str(shards)]) == 2
            assert capsys.readouterr().err.count("train.manifest.json") == 2 and contents(shards) == before

    def test_damaged_index_or_files_that_are_no_json(self, images: Path, shards: Path) -> None:
        (shards / "train.index.npz").write_bytes(b"PK")
        with pytest.raises(UserError, match="cannot read .*train.index.npz"):
            opened(shards)
        (shards / "train.manifest.json").write_text("{")
        with pytest.raises(UserError, match="train.manifest.json cannot be read"):
            opened(shards)

    @pytest.mark.parametrize("content", ["[]", '{"splits": {"train": 5}}', '{"splits": 5}', "{"])
    def test_damaged_info_of_a_stream(self, tmp_path: Path, content: str) -> None:
        pytest.importorskip("webdataset", reason="reads shards without an index")
        (tmp_path / "_info.json").write_text(content)
        for split_name in ("train", "x-{0..1}.tar|3"):
            with pytest.raises(UserError):
                opened(tmp_path, split_name=split_name)

    def test_webdataset_reads_them_too(self, images: Path, shards: Path) -> None:
        pytest.importorskip("webdataset", reason="reads shards without an index")
        indexed = opened(shards)
        for name in ("train.manifest.json", "train.index.npz"):
            (shards / name).unlink()
        stream = opened(shards)
        assert isinstance(stream, StreamSource) and len(stream) == 19 and stream.num_classes == 3
        shown = list(EvalLoader(stream, size=16, batch_size=19))
        expected = list(EvalLoader(indexed, size=16, batch_size=19))
        assert torch.equal(shown[0].x, expected[0].x) and torch.equal(shown[0].y, expected[0].y)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address(shards: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(shards)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class TestHTTP:
    @pytest.fixture(autouse=True)
    def _webdataset(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("webdataset", reason="reads shards over HTTP")
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_trains_from_it_and_resumes_by_step(self, address: str, workers: int) -> None:
        source = opened(address)
        assert isinstance(source, StreamSource) and source.shards == 5 and len(source) == 19
        loader = TrainLoader(source, augmentation=1, batch_size=2, num_workers=workers)
        whole = list(loader.epoch(0, 16))
        rest = list(loader.epoch(0, 16, 3))
        assert len(whole) == 9 and whole[0].draws is not None
        for a, b in zip(rest, whole[3:], strict=True):
            assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and all(map(torch.equal, a.draws, b.draws))

    def test_processes_and_workers_share_the_shards(self, address: str) -> None:
        """An evaluation of the stream over two ranks shows each image once."""
        shown = [
            batch.y
            for rank in range(2)
            for batch in EvalLoader(opened(address), size=8, batch_size=4, rank=rank, world_size=2, num_workers=1)
        ]
        assert sorted(torch.cat(shown).tolist()) == [0] * 5 + [1] * 7 + [2] * 7

    def test_a_shard_that_is_not_there(self, address: str, shards: Path) -> None:
        source = opened(address)
        (shards / "train-00001.tar").unlink()
        for batches in (
            TrainLoader(source, augmentation=1, batch_size=2).epoch(0, 8),
            EvalLoader(source, size=8, batch_size=4),
        ):
            with pytest.raises(UserError, match=r"cannot be read .*train-00001.tar"):
                list(batches)

    def test_nothing_there(self, address: str) -> None:
        with pytest.raises(UserError, match="cannot open split train of wds/http"):
            opened(f"{address}/elsewhere")
