"""Image sources: layouts, class numbers, errors, and images in memory."""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import os
import struct
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import folder

from common.errors import UserError
from data import folders, memory
from data.datasets import open_source
from data.decoding import DECODE_ERRORS, decode
from data.memory import MemorySource
from data.source import Source, StreamSource, facts_of
from tests.data import encoded, picture, write_folder

ROOT = Path(__file__).parents[2]


def opened(spec: object, split: str = "train", **options: object) -> Source:
    return open_source(str(spec), split=split, **options)


def contents(source: Source) -> list[tuple[bytes, str]]:
    return sorted((source.image(i), source.class_names[source.labels[i]]) for i in range(len(source)))


def pack(path: Path, folder: Path, prefix: str = "") -> Path:
    with tarfile.open(path, "w") as tar:
        tar.add(folder, arcname=prefix or ".")
    return path


class TestFolder:
    def test_classes_are_sorted_names_and_images_are_the_files_bytes(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"n2": 2, "n10": 1, "b": 3})
        source = opened(tmp_path)
        assert source.class_names == ["b", "n10", "n2"] and source.num_classes == 3 and len(source) == 6
        for i in range(6):
            image, label = source.read(i)
            path = Path(source.name(i))
            assert image == path.read_bytes() and path.parent == tmp_path / source.class_names[label]
        assert len({source.name(i) for i in range(6)}) == 6

    @pytest.mark.parametrize("val", ["val", "validation"])
    def test_splits_are_sub_folders(self, tmp_path: Path, val: str) -> None:
        write_folder(tmp_path / "train", {"a": 3, "b": 2})
        write_folder(tmp_path / val, {"a": 1, "b": 1})
        assert len(opened(tmp_path)) == 5 and len(opened(tmp_path, "val")) == 2
        assert len(opened(tmp_path / "train", "val")) == 5  # given directly: used as it is

    def test_a_class_may_be_called_train(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"car": 1, "train": 2})
        assert opened(tmp_path).class_names == ["car", "train"]

    def test_links_nested_folders_endings_and_hidden_folders(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "elsewhere", {"x": 2})
        root = write_folder(tmp_path / "set", {"a": 1, "c/deep/er": 1})
        (root / "b").symlink_to(tmp_path / "elsewhere" / "x")
        (root / ".cache").mkdir()
        (root / "a" / "UPPER.JPEG").write_bytes(encoded(9, kind="JPEG"))
        (root / "a" / "notes.txt").write_text("no image")
        source = opened(root)
        assert source.class_names == ["a", "b", "c"]
        assert np.bincount(source.labels).tolist() == [2, 2, 1]

    @pytest.mark.parametrize("packed", [False, True])
    def test_hidden_files_are_no_images(self, tmp_path: Path, packed: bool) -> None:
        """macOS's ._ files, and the copies that editors keep."""
        root = write_folder(tmp_path / "set", {"a": 2, "b/..deep": 0, "b": 1})
        for name in ("._loose.png", "a/._000.png", "a/.hidden.JPEG", "b/.ipynb_checkpoints/000.png", "b/..deep/1.png"):
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(b"\0\5\x16\7")
        source = opened(pack(tmp_path / "set.tar", root) if packed else root)
        keys = [source.key(i).removeprefix("./") for i in range(len(source))]
        assert keys == ["a/000.png", "a/001.png", "b/000.png"] and source.class_names == ["a", "b"]
        if packed:  # in a hidden folder
            with tarfile.open(tmp_path / "other.tar", "w") as tar:
                tar.add(root, arcname=".cache/set")
            assert len(opened(tmp_path / "other.tar")) == 3

    def test_names_that_are_not_ascii(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"Käse": 1})
        (tmp_path / "Käse" / "000.png").rename(tmp_path / "Käse" / "über – 1.png")
        assert opened(tmp_path).name(0).endswith("Käse/über – 1.png") and opened(tmp_path).image(0) == encoded(0)

    def test_tilde_is_the_home_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_folder(tmp_path / "pictures", {"a": 1})
        monkeypatch.setenv("HOME", str(tmp_path))
        assert len(opened("~/pictures")) == 1


class TestLinks:
    """Data sets on clusters are often folders of links."""

    def test_links_to_images_and_folders_are_what_they_lead_to(self, tmp_path: Path) -> None:
        pool = write_folder(tmp_path / "pool", {"x": 2, "y/z": 1, "loose": 1})
        root = write_folder(tmp_path / "set", {"a": 1, "d": 1})
        (root / "b").symlink_to(pool / "x")  # a class
        (root / "c").symlink_to(pool / "x")  # another one of the same images
        (root / "a" / "more").symlink_to("../../pool/y")  # a folder in a class; its images lie deeper
        (root / "d" / "link.png").symlink_to(pool / "loose" / "000.png")
        source = opened(root)
        assert source.class_names == ["a", "b", "c", "d"]
        assert [source.key(i) for i in range(len(source))] == [
            *("a/000.png", "a/more/z/000.png", "b/000.png", "b/001.png", "c/000.png", "c/001.png"),
            *("d/000.png", "d/link.png"),
        ]
        assert all(source.image(i) == (root / source.key(i)).read_bytes() for i in range(len(source)))
        (tmp_path / "alias").symlink_to(root)
        assert contents(opened(tmp_path / "alias")) == contents(source)

    @pytest.mark.parametrize(
        ("link", "target"),
        [
            ("a/self", "."),
            ("a/deep/up", ".."),
            ("a/root", ".."),
            ("a/deep/outside", "../../.."),  # the folder that holds the set
            ("loop", "."),  # would be a class
            ("a/circle", "circle"),
        ],
    )
    def test_a_circular_link_is_skipped(self, tmp_path: Path, link: str, target: str) -> None:
        root = write_folder(tmp_path / "set", {"a": 1, "a/deep": 1, "b": 1})
        plain = contents(opened(root))
        (root / link).symlink_to(target)
        for split in ("train", "val"):
            assert contents(opened(root, split)) == plain

    def test_folders_that_lead_to_each_other(self, tmp_path: Path) -> None:
        root = write_folder(tmp_path / "set", {"a": 1, "a/deep": 1, "b": 1})
        (root / "a" / "there").symlink_to("../b")
        (root / "b" / "back").symlink_to("../a")
        source = opened(root)
        assert [source.key(i) for i in range(len(source))] == [
            *("a/000.png", "a/deep/000.png", "a/there/000.png"),
            *("b/000.png", "b/back/000.png", "b/back/deep/000.png"),
        ]

    def test_dangling_image_is_reported_when_met(self, tmp_path: Path) -> None:
        root = write_folder(tmp_path / "set", {"a": 1})
        (root / "a" / "gone.png").symlink_to(tmp_path / "gone.png")
        source = opened(root)
        assert source.name(1) == str(root / "a" / "gone.png")
        with pytest.raises(DECODE_ERRORS, match=r"No such file.*set/a/gone.png"):
            source.read(1)

    def test_pipes_are_skipped(self, tmp_path: Path) -> None:
        """Reading one would block for ever."""
        root = write_folder(tmp_path / "set", {"a": 1})
        os.mkfifo(root / "a" / "pipe.png")
        (root / "a" / "link.png").symlink_to("pipe.png")
        (root / "a" / "circle.png").symlink_to("circle.png")
        source = opened(root)
        assert [source.key(i) for i in range(len(source))] == ["a/000.png", "a/circle.png"]

    def test_dangling_class_is_an_error(self, tmp_path: Path) -> None:
        """Skipping it would shift the numbers of all classes after it."""
        root = write_folder(tmp_path / "set", {"a": 1})
        (root / "b").symlink_to(tmp_path / "gone")
        (root / ".hidden").symlink_to(tmp_path / "gone")
        with pytest.raises(UserError, match=".*set, found broken links: b\\."):
            opened(root)

    def test_a_folder_in_a_class_that_may_not_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root = write_folder(tmp_path / "set", {"a": 1, "a/shut": 1})
        scandir = os.scandir

        def refuse(path: object) -> object:
            if str(path).endswith("shut"):
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(folders.os, "scandir", refuse)
        with pytest.raises(UserError, match="cannot read .*set/a/shut .*Permission denied"):
            opened(root)

    def test_order_is_torchvisions(self, tmp_path: Path) -> None:
        """Another order would make resumed runs skip and repeat samples."""
        root = write_folder(tmp_path, {"b": 2, "a/x": 2, "a/x-y": 1, "a/x/z": 1, "a": 11, "a.b": 1})
        (root / "a" / "link").symlink_to("../b")
        numbers = {"a": 0, "a.b": 1, "b": 2}
        expected = folder.make_dataset(root, numbers, extensions=folder.IMG_EXTENSIONS)
        source = opened(root)
        assert [(source.name(i), source.labels[i]) for i in range(len(source))] == expected


def _empty(path: Path) -> None:
    path.mkdir()


def _loose(path: Path) -> None:
    path.mkdir()
    (path / "1.png").write_bytes(encoded(1))


def _text(path: Path) -> None:
    (path / "a").mkdir(parents=True)
    (path / "a" / "1.txt").write_text("text")


def _one_class_empty(path: Path) -> None:
    write_folder(path, {"a": 1})
    (path / "gap").mkdir()


def _only_val(path: Path) -> None:
    write_folder(path / "val", {"a": 1})


def _file(path: Path) -> None:
    path.write_text("text")


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda path: None, ["found nothing"]),
        (_empty, ["sub-folder for each class", "0 loose"]),
        (_loose, ["sub-folder for each class", "1 loose"]),
        (_text, ["expected images (.jpg", "found none in a"]),
        (_one_class_empty, ["found none in gap"]),
        (_only_val, ["train with class folders", "found val"]),
        (_file, ["found a file"]),
    ],
)
def test_folder_errors_name_flag_path_expected_and_found(tmp_path: Path, prepare, words: list[str]) -> None:
    prepare(tmp_path / "images")
    with pytest.raises(UserError) as error:
        opened(tmp_path / "images")
    for word in [str(tmp_path / "images"), "expected", *words]:
        assert word in str(error.value)


def test_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(folders.os, "scandir", refuse)
    with pytest.raises(UserError, match="cannot read .*Permission denied"):
        opened(tmp_path)


class TestClassNames:
    def test_validation_labels_are_matched_by_name(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "train", {"ant": 1, "bee": 1, "cat": 1, "dog": 1})
        write_folder(tmp_path / "val", {"bee": 1, "dog": 2})
        train = opened(tmp_path)
        val = opened(tmp_path, "val", class_names=train.class_names)
        assert val.labels.tolist() == [1, 3, 3]
        assert val.class_names == train.class_names and val.num_classes == 4

    def test_unknown_class(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "val", {"bee": 1, "wasp": 1})
        with pytest.raises(UserError, match="wasp.*ant, bee"):
            opened(tmp_path, "val", class_names=["ant", "bee"])

    def test_an_empty_class_of_a_validation_set_is_fine(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "val", {"bee": 1})
        (tmp_path / "val" / "ant").mkdir()
        assert opened(tmp_path, "val", class_names=["ant", "bee"]).labels.tolist() == [1]


class TestTar:
    @pytest.mark.parametrize("prefix", ["", "some/prefix"])
    def test_is_the_folder_it_was_made_of(self, tmp_path: Path, prefix: str) -> None:
        folder = write_folder(tmp_path / "images", {"a": 3, "b": 2})
        tar = opened(pack(tmp_path / "images.tar", folder, prefix))
        assert contents(tar) == contents(opened(folder)) and tar.class_names == ["a", "b"]
        assert tar.name(0).startswith(f"{tmp_path}/images.tar:") and tar.name(0).endswith("/a/000.png")

    def test_splits(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "images" / "train", {"a": 3})
        write_folder(tmp_path / "images" / "val", {"a": 1})
        both = pack(tmp_path / "both.tar", tmp_path / "images")
        assert len(opened(both)) == 3 and len(opened(both, "val")) == 1
        only = pack(tmp_path / "only.tar", tmp_path / "images" / "val", "val")
        with pytest.raises(UserError, match="train with class folders in .*only.tar, found val"):
            opened(only)

    def test_errors(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "images", {"a": 3})
        whole = pack(tmp_path / "whole.tar", folder).read_bytes()
        (tmp_path / "zipped.tar").write_bytes(gzip.compress(whole))
        (tmp_path / "cut.tar").write_bytes(whole[:700])
        with tarfile.open(tmp_path / "loose.tar", "w") as tar:
            tar.add(folder / "a" / "000.png", "000.png")
        for name, words in {"zipped": "uncompressed tar", "cut": "complete", "loose": "1 loose"}.items():
            with pytest.raises(UserError, match=f"{words}"):
                opened(tmp_path / f"{name}.tar")

    @pytest.mark.parametrize("damage", ["bit of a header", "between members", "inside a header", "inside the mark"])
    def test_a_tar_that_ends_early(self, tmp_path: Path, damage: str) -> None:
        path = pack(tmp_path / "set.tar", write_folder(tmp_path / "images", {"a": 3, "b": 2}))
        with tarfile.open(path) as tar:
            member = [member for member in tar if member.isfile()][2]
            end = tar.offset
        content = bytearray(path.read_bytes())
        if damage == "bit of a header":
            content[member.offset + 3] ^= 1
        else:
            begin = {
                "between members": member.offset,
                "inside a header": member.offset + 200,
                "inside the mark": end + 512,
            }
            del content[begin[damage] :]
        path.write_bytes(content)
        at = end if damage == "inside the mark" else member.offset
        with pytest.raises(UserError, match=f".*set.tar is not a complete, .*at byte {at},"):
            opened(path)


def add(tar: tarfile.TarFile, name: str, *, data: bytes = b"", link: str = "", kind: bytes = tarfile.REGTYPE) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    tar.addfile(info, io.BytesIO(data))


def test_members_replaced_in_a_tar(tmp_path: Path) -> None:
    """As after extraction: the last member of a name counts, whatever it is; a hard link keeps its original content."""
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        add(tar, "a/0.png", data=encoded(0))
        add(tar, "a/1.png", data=encoded(1))
        add(tar, "a/hard.png", link="a/0.png", kind=tarfile.LNKTYPE)
        add(tar, "a/soft.png", link="0.png", kind=tarfile.SYMTYPE)
        add(tar, "a/2.png", link="gone.png", kind=tarfile.SYMTYPE)
        add(tar, "a/0.png", link="a/0.png", kind=tarfile.LNKTYPE)  # as GNU tar packs a file of two names twice
        add(tar, "./a/0.png", data=encoded(10))
        add(tar, "a/0.png", link="a/0.png", kind=tarfile.LNKTYPE)
        add(tar, "a/1.png", link="soft.png", kind=tarfile.SYMTYPE)
        add(tar, "a/2.png", data=encoded(2))
    source = opened(tmp_path / "set.tar")
    found = {source.key(i).removeprefix("./"): source.image(i) for i in range(len(source))}
    assert len(source) == len(found) == 5
    seeds = {"a/0.png": 10, "a/1.png": 10, "a/2.png": 2, "a/hard.png": 0, "a/soft.png": 10}
    assert found == {name: encoded(seed) for name, seed in seeds.items()}


class TestLinksInTar:
    def test_are_the_files_they_lead_to(self, tmp_path: Path) -> None:
        root = write_folder(tmp_path / "set", {"a": 2, "b": 1})
        (root / "b" / "hard.png").hardlink_to(root / "a" / "000.png")
        (root / "b" / "soft.png").symlink_to("../a/001.png")
        (root / "a" / "chain.png").symlink_to("../b/soft.png")
        for prefix in ("", "prefix"):
            path = pack(tmp_path / "set.tar", root, prefix)
            with tarfile.open(path) as tar:
                assert sum(member.islnk() for member in tar) == 1 and sum(member.issym() for member in tar) == 2
            assert contents(opened(path)) == contents(opened(root))

    @pytest.mark.parametrize(
        ("kind", "target"),
        [
            (tarfile.SYMTYPE, "{}/secret.png"),
            (tarfile.SYMTYPE, "../../secret.png"),
            (tarfile.LNKTYPE, "{}/secret.png"),
            (tarfile.LNKTYPE, "../secret.png"),
            (tarfile.SYMTYPE, "gone.png"),
            (tarfile.SYMTYPE, "."),
            (tarfile.SYMTYPE, "link.png"),
        ],
    )
    def test_out_of_the_archive_to_nothing_or_to_a_folder(self, tmp_path: Path, kind: bytes, target: str) -> None:
        (tmp_path / "secret.png").write_bytes(encoded(1))
        with tarfile.open(tmp_path / "set.tar", "w") as tar:
            add(tar, "a/0.png", data=encoded(0))
            add(tar, "a/link.png", link=target.format(tmp_path), kind=kind)
        with pytest.raises(UserError, match=".*set.tar.*a/link.png → .*tar --dereference"):
            opened(tmp_path / "set.tar")

    def test_a_class_that_is_a_link(self, tmp_path: Path) -> None:
        root = write_folder(tmp_path / "set", {"a": 1})
        (root / "b").symlink_to("a")
        with pytest.raises(UserError, match="links to folders or to the outside: ./b → a"):
            opened(pack(tmp_path / "set.tar", root))
        subprocess.run(["tar", "-chf", tmp_path / "whole.tar", "-C", root, "."], check=True)
        assert contents(opened(tmp_path / "whole.tar")) == contents(opened(root))


class TestDigits:
    def test_against_scikit_learn(self) -> None:
        digits = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn").load_digits()
        train, val = opened("digits"), opened("digits", "val")
        assert (len(train), len(val), train.num_classes) == (1437, 360, 10)
        assert train.class_names == val.class_names == [str(i) for i in range(10)]
        # A stratified split: in each class a fifth, to the nearest image.
        shares = np.bincount(val.labels) / np.bincount(digits.target)
        assert np.abs(shares - 360 / 1797).max() < 0.01

        image, label = train.read(0)
        assert image.size == (32, 32) and image.mode == "RGB"
        # Shrunk again, a picture is closest to one of scikit-learn's with the same label.
        distance = np.abs(digits.images * 255 / 16 - np.asarray(image.resize((8, 8), Image.Resampling.BOX))[..., 0])
        assert digits.target[distance.mean((1, 2)).argmin()] == label and distance.mean((1, 2)).min() < 15
        again = opened("digits")
        assert again.labels.tolist() == train.labels.tolist() and again.read(5)[0] == train.read(5)[0]

    def test_split_is_disjoint_and_complete(self) -> None:
        digits = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn").load_digits()
        seen = [image.tobytes() for split in ("train", "val") for image in opened("digits", split)._images]
        assert sorted(seen) == sorted(np.rint(x * 255 / 16).astype(np.uint8).tobytes() for x in digits.images)


class TestTorchvision:
    def test_image_folder_gives_bytes(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "train", {"a": 1, "b": 2})
        (tmp_path / "train" / "a" / "._000.png").write_bytes(b"of macOS, no image")
        source = opened("torch/image_folder", root=str(tmp_path))
        assert contents(source) == contents(opened(tmp_path)) and source.name(0) == str(tmp_path / "train/a/000.png")

    def test_mnist_gives_pictures(self, tmp_path: Path) -> None:
        raw = tmp_path / "MNIST" / "raw"
        raw.mkdir(parents=True)
        images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
        for part in ("train", "t10k"):
            (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, 5, 28, 28) + images.tobytes())
            (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 5) + bytes([3, 1, 4, 1, 5]))
        source = opened("torch/mnist", root=str(tmp_path))
        image, label = source.read(2)
        assert label == 4 and np.array_equal(np.asarray(decode(image)), np.repeat(images[2][..., None], 3, axis=2))
        assert source.num_classes == 10 and source.name(2) == "torch/mnist[2]"
        memory = opened("torch/mnist", root=str(tmp_path), in_memory=True)
        assert decode(memory.read(2)[0]) == decode(image)

    @pytest.mark.parametrize("name", ["torch/cifar10", "torch/no_such_set"])
    def test_errors(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(UserError, match=f"{name}.*to root"):
            opened(name, root=str(tmp_path))


class TestHuggingFace:
    @pytest.fixture(autouse=True)
    def _needs_datasets(self) -> None:
        pytest.importorskip("datasets", reason="hfds/ needs the package datasets")

    def test_folder_with_class_names(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "Set" / "train", {"bee": 2, "ant": 1})
        write_folder(tmp_path / "Set" / "validation", {"bee": 1})
        train = opened(f"hfds/{tmp_path}/Set", root=str(tmp_path / "cache"))
        assert train.class_names == ["ant", "bee"]
        assert contents(train) == contents(opened(tmp_path / "Set"))
        assert train.name(0).endswith(".png")

    def test_parquet_with_plain_numbers(self, tmp_path: Path) -> None:
        source = opened(self.parquet(tmp_path / "set", [0, 2, 1]), root=str(tmp_path / "cache"))
        assert source.class_names is None and source.num_classes == 3 and source.labels.tolist() == [0, 2, 1]
        assert [source.read(i) for i in range(3)] == [(encoded(i), label) for i, label in enumerate([0, 2, 1])]
        # A set that only numbers its classes keeps its numbers.
        again = opened(f"hfds/{tmp_path}/set", root=str(tmp_path / "cache"), class_names=["a", "b", "c"])
        assert again.labels.tolist() == [0, 2, 1]

    def test_errors(self, tmp_path: Path) -> None:
        cache = str(tmp_path / "cache")
        with pytest.raises(UserError, match="labels from 0 on.*-1"):
            opened(self.parquet(tmp_path / "unlabelled", [-1, -1]), root=cache)
        with pytest.raises(UserError, match="image and a label column.*found picture, label"):
            opened(self.parquet(tmp_path / "columns", [1], image="picture"), root=cache)
        with pytest.raises(UserError, match="split validation of hfds/"):
            opened(self.parquet(tmp_path / "split", [1]), "val", root=cache)
        with pytest.raises(UserError):
            opened(f"hfds/{tmp_path}/nothing", root=cache)

    @staticmethod
    def parquet(folder: Path, labels: list[int], image: str = "image") -> str:
        pa = pytest.importorskip("pyarrow", reason="writes parquet")
        parquet = pytest.importorskip("pyarrow.parquet", reason="writes parquet")
        folder.mkdir(exist_ok=True)
        cells = [{"bytes": encoded(i), "path": None} for i in range(len(labels))]
        parquet.write_table(pa.table({image: cells, "label": labels}), folder / "train.parquet")
        return f"hfds/{folder}"


class TestWebDataset:
    @pytest.fixture(autouse=True)
    def _needs_webdataset(self) -> None:
        pytest.importorskip("webdataset", reason="wds/ needs the package webdataset")

    def test_number_of_classes_and_splits_come_from_the_info_file(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="_info.json"):
            opened(f"wds/{tmp_path}")
        split = {"name": "train", "num_samples": 4, "filenames": ["0.tar", "1.tar"], "shard_lengths": [2, 2]}
        (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
        with pytest.raises(UserError, match="num_classes"):
            opened(f"wds/{tmp_path}")
        (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": split}, "num_classes": 7}))
        source = opened(f"wds/{tmp_path}")
        assert isinstance(source, StreamSource)
        assert (len(source), source.shards, source.num_classes, source.class_names) == (4, 2, 7, None)
        assert len(opened(f"wds/{tmp_path}", "val", split_name="{0..1}.tar|3")) == 3
        with pytest.raises(UserError, match="split validation of"):
            opened(f"wds/{tmp_path}", "val")
        with pytest.raises(UserError, match="stream.*turn in_memory off"):
            opened(f"wds/{tmp_path}", in_memory=True)


@pytest.mark.parametrize(
    ("spec", "module", "package"),
    [
        ("digits", "sklearn.datasets", "scikit-learn"),
        ("hfds/x", "datasets", "datasets"),
        ("hfids/x", "datasets", "datasets"),
        ("wds/x", "webdataset", "webdataset"),
        ("tfds/x", "tensorflow_datasets", "tensorflow tensorflow-datasets"),
    ],
)
def test_missing_packages_are_reported(monkeypatch: pytest.MonkeyPatch, spec: str, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # makes its import fail
    with pytest.raises(UserError, match=f"{spec} needs a package: pip install {package}"):
        opened(spec)


def test_folders_need_none_of_the_optional_packages(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": 2, "b": 2})
    code = (
        "import sys\n"
        "for name in ('sklearn', 'webdataset', 'datasets', 'tensorflow_datasets'): sys.modules[name] = None\n"
        "from data.datasets import open_source\n"
        "from data.loader import TrainLoader\n"
        "source = open_source(sys.argv[1], split='train')\n"
        "print(next(TrainLoader(source, augmentation=1, batch_size=4).epoch(0, 16)).x.shape)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "torch.Size([4, 3, 16, 16])" in done.stdout, done.stderr


class TestInMemory:
    def test_same_bytes_labels_and_names_in_shared_memory(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path, {"a": 150, "b": 200})
        plain, memory = opened(folder), opened(folder, in_memory=True)
        assert isinstance(memory, MemorySource)
        assert sum(map(memory.size, range(350))) == sum(path.stat().st_size for path in folder.rglob("*.png"))
        for path in folder.rglob("*.png"):
            path.unlink()  # nothing is read again
        assert [memory.read(i) for i in (0, 149, 150, 349)] == [(encoded(i), i >= 150) for i in (0, 149, 150, 349)]
        assert memory.name(349) == plain.name(349) and memory.num_classes == 2 and len(memory) == 350

    def test_class_numbers_of_the_training_set(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "val", {"b": 1})
        assert opened(tmp_path, "val", class_names=["a", "b"], in_memory=True).read(0) == (encoded(0), 1)

    def test_what_cannot_be_read_becomes_an_empty_image(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"a": 3})
        (tmp_path / "a" / "001.png").unlink()
        (tmp_path / "a" / "001.png").symlink_to(tmp_path / "gone.png")
        memory = opened(tmp_path, in_memory=True)
        assert [memory.read(i)[0] for i in range(3)] == [encoded(0), b"", encoded(2)]

    @pytest.mark.parametrize("short", ["this machine", "this container"])
    def test_too_little_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: str) -> None:
        write_folder(tmp_path / "images", {"a": 2})
        size = sum(path.stat().st_size for path in tmp_path.rglob("*.png")) + 3 * 8
        free = dict.fromkeys(("this machine", "this container"), 10 * size)
        monkeypatch.setattr(memory, "_CGROUP", tmp_path)
        (tmp_path / "memory.current").write_text("1000\n")
        for enough in (True, False):
            free[short] = size if enough else size - 1
            (tmp_path / "memory.max").write_text(f"{1000 + free['this container']}\n")
            monkeypatch.setattr(
                memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=free["this machine"])
            )
            if enough:
                assert len(opened(tmp_path / "images", in_memory=True)) == 2
            else:
                with pytest.raises(UserError, match=rf"keeping .* needs 0.00 GiB.*{short}.*Turn in_memory off"):
                    opened(tmp_path / "images", in_memory=True)

    def test_another_process_opens_the_same_memory(self, tmp_path: Path) -> None:
        """The second process of a machine reads the first one's memory, although the files are empty and the first has closed."""
        write_folder(tmp_path, {"a": 3})
        first = opened(tmp_path, in_memory=True)
        path = memory._path(first._file)
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe()

        def second() -> None:
            # Close what was inherited, because processes that are started do not have it.
            first._content.close()
            first._file.close()
            source = opened(tmp_path, in_memory=True, once=lambda *_: path)
            there.send("open")
            there.recv()
            there.send(source.image(2))

        for file in (tmp_path / "a").iterdir():
            file.write_bytes(b"")
        other = context.Process(target=second)
        other.start()
        there.close()
        assert here.recv() == "open"
        first._content.close()
        first._file.close()
        here.send("the first one has closed")
        assert here.recv() == encoded(2)
        other.join()
        assert other.exitcode == 0

    def test_memory_of_a_process_that_cannot_be_seen(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"a": 3})
        with pytest.raises(UserError, match=".*/proc/1/fd/999.*in one container.*turn in_memory off"):
            opened(tmp_path, in_memory=True, once=lambda *_: "/proc/1/fd/999")

    def test_nothing_is_left_behind(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"a": 3})
        before = set(os.listdir("/dev/shm"))
        source = opened(tmp_path, in_memory=True)
        assert set(os.listdir("/dev/shm")) == before and source.image(1) == encoded(1)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


class TestDecode:
    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
    def test_every_mode_becomes_rgb(self, mode: str) -> None:
        image = picture(3).convert(mode)
        assert decode(image) == decode(saved(image, "PNG")) == image.convert("RGB")

    def test_cmyk(self) -> None:
        data = saved(picture(3).convert("CMYK"), "JPEG", quality=95)
        assert decode(data).mode == "RGB"
        assert np.abs(np.asarray(decode(data), float) - np.asarray(picture(3), float)).mean() < 5

    def test_16_bit_grey_keeps_its_greys(self) -> None:
        greys = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # 0x0000, 0x0101, …, 0xffff
        result = np.asarray(decode(saved(Image.fromarray(greys), "PNG")))
        assert np.array_equal(result, np.repeat((greys // 257)[..., None], 3, axis=2))

    def test_palette_with_an_alpha_table_does_not_warn(self) -> None:
        image = picture(3).convert("P")
        data = saved(image, "PNG", transparency=bytes(range(256)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert decode(data) == image.convert("RGB")

    def test_broken_files_raise_one_of_the_errors_the_loader_knows(self) -> None:
        rng = np.random.default_rng(0)
        whole = [encoded(1, kind=kind) for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")]
        broken = 0
        for trial in range(1500):
            data = bytearray(whole[trial % len(whole)])
            for _ in range(rng.integers(1, 6)):
                data[rng.integers(min(len(data), 150))] = rng.integers(256)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    decode(bytes(data[: rng.integers(1, len(data) + 1)] if trial % 3 == 0 else data))
            except DECODE_ERRORS:
                broken += 1
        assert 500 < broken < 1500


# --- what tells a data set from another -------------------------------------------------------------------------------


class Pictures(Source):
    def __init__(self, images: list, labels: list[int]) -> None:
        super().__init__(labels, ["a", "b"])
        self.images = images

    def image(self, i: int) -> bytes | Image.Image:
        if isinstance(self.images[i], Exception):
            raise self.images[i]
        return self.images[i]


def test_facts_tell_images_labels_and_order():
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    facts = facts_of(Pictures([red, blue], [0, 1]))
    assert facts | {"sample": None} == {"images": 2, "classes": ["a", "b"], "sample": None}
    assert facts == facts_of(Pictures([red.copy(), blue.copy()], [0, 1]))
    others = [Pictures([blue, red], [0, 1]), Pictures([red, blue], [1, 0]), Pictures([red, red], [0, 1])]
    assert len({facts_of(other)["sample"] for other in others} | {facts["sample"]}) == 4


@pytest.mark.parametrize("error", [OSError("stale"), SyntaxError("broken PNG"), Image.DecompressionBombError("large")])
def test_facts_of_images_that_cannot_be_read_are_unknown(error):
    assert facts_of(Pictures([b"x", error], [0, 1]))["sample"] is None
