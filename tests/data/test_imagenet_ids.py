"""RobustBench's list of ImageNet images, and the validation folder with these images."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from data.datasets import open_source
from data.folders import class_folders, open_listed
from data.imagenet_ids import ImageIds, imagenet_classes, looks_like_imagenet, robustbench_ids
from data.source import Source
from tests.data import encoded, write_folder

ROOT = Path(__file__).parents[2]


def installed_list() -> ImageIds:
    if importlib.util.find_spec("robustbench") is None:
        pytest.skip("the list is part of robustbench")
    return robustbench_ids()


def write_imagenet(folder: Path, ids: ImageIds) -> Path:
    """Write `folder/val` with 1,000 class folders and the listed images, which are all the same file."""
    image = folder / "image.JPEG"
    image.parent.mkdir(parents=True, exist_ok=True)
    image.write_bytes(encoded(0, kind="JPEG"))
    for name in ids.class_names:
        (folder / "val" / name).mkdir(parents=True)
    for key in ids.keys:
        os.link(image, folder / "val" / key)
    return folder


def link_classes(target: Path, imagenet: Path, names: list[str]) -> Path:
    """Make a validation folder whose class folders are links to those of `imagenet`."""
    target.mkdir(parents=True)
    for name in names:
        (target / name).symlink_to(imagenet / "val" / name)
    return target


@pytest.fixture(scope="module")
def ids() -> ImageIds:
    return installed_list()


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory, ids: ImageIds) -> Path:
    return write_imagenet(tmp_path_factory.mktemp("imagenet"), ids)


def listed(spec: object, ids: ImageIds) -> Source:
    return open_listed(str(spec), ids.keys, ids.class_names)


class TestList:
    def test_what_it_holds(self, ids: ImageIds) -> None:
        assert len(ids.keys) == len(set(ids.keys)) == 5000
        assert len(ids.class_names) == 1000 and ids.class_names == sorted(set(ids.class_names))
        assert ids.class_names == imagenet_classes()
        assert (ids.class_names[0], ids.class_names[999]) == ("n01440764", "n15075141")  # tench, toilet tissue
        assert {key.split("/")[0] for key in ids.keys} <= set(ids.class_names)
        files = [key.split("/")[1] for key in ids.keys]
        assert all(name.startswith("ILSVRC2012_val_") and name.endswith(".JPEG") for name in files)
        assert len(set(files)) == 5000

    def test_robustbench_is_not_imported(self, ids: ImageIds) -> None:
        code = (
            "import sys\n"
            "from data.imagenet_ids import robustbench_ids\n"
            "ids = robustbench_ids()\n"
            "assert 'robustbench' not in sys.modules\n"
            "print(len(ids.keys), ids.keys[0])\n"
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.stdout.split() == ["5000", ids.keys[0]], done.stderr

    def test_robustbench_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "robustbench", None)  # as if it were not installed
        with pytest.raises(UserError, match=".*not installed: pip install robustbench"):
            robustbench_ids()

    @pytest.mark.parametrize("map_file", [None, "not JSON"])
    def test_robustbench_has_no_list(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, map_file: str | None
    ) -> None:
        self.install(tmp_path, monkeypatch)
        if map_file is not None:
            (tmp_path / "robustbench" / "helper_files" / "imagenet_class_to_id_map.json").write_text(map_file)
        with pytest.raises(UserError, match=f".*no readable list of images in {tmp_path}"):
            robustbench_ids()

    def test_classes_follow_their_numbers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = self.install(tmp_path, monkeypatch)
        (folder / "imagenet_class_to_id_map.json").write_text(json.dumps({"a": 2, "b": 0, "c": 1}))
        assert robustbench_ids() == ImageIds(keys=["c/2.JPEG", "a/1.JPEG"], class_names=["b", "c", "a"])

    @staticmethod
    def install(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Install a robustbench that cannot be imported, with a list of images and without a map of classes."""
        folder = place / "robustbench" / "helper_files"
        folder.mkdir(parents=True)
        (place / "robustbench" / "__init__.py").write_text("raise ImportError('one of its packages is missing')")
        (folder / "imagenet_test_image_ids.txt").write_text("c/2.JPEG\na/1.JPEG\n")
        monkeypatch.delitem(sys.modules, "robustbench", raising=False)
        monkeypatch.syspath_prepend(place)
        return folder

    def test_folders_named_like_imagenet(self, ids: ImageIds) -> None:
        for names, expected in [
            (ids.class_names, True),
            ([*ids.class_names, "more"], True),
            (ids.class_names[:900], True),
            (ids.class_names[:899] + ["ant", "bee"], False),
            ([], False),
        ]:
            assert looks_like_imagenet(names) is expected


class TestListed:
    @pytest.mark.parametrize("below", ["", "val"])
    def test_order_and_labels_are_those_of_the_list(self, imagenet: Path, ids: ImageIds, below: str) -> None:
        source = listed(imagenet / below, ids)
        package = Path(importlib.util.find_spec("robustbench").origin).parent
        numbers = json.loads((package / "helper_files" / "imagenet_class_to_id_map.json").read_text())
        assert len(source) == 5000 and source.num_classes == 1000 and source.class_names == ids.class_names
        assert [source.key(i) for i in range(5000)] == ids.keys
        assert source.labels.tolist() == [numbers[key.split("/")[0]] for key in ids.keys]
        # The same numbers as those of a folder that is opened without the list, which training uses.
        assert open_source(str(imagenet), split="val").class_names == source.class_names
        assert source.name(7) == str(imagenet / "val" / ids.keys[7])
        assert source.read(7) == (encoded(0, kind="JPEG"), numbers[ids.keys[7].split("/")[0]])

    def test_class_folders_may_be_links(self, tmp_path: Path, imagenet: Path, ids: ImageIds) -> None:
        source = listed(link_classes(tmp_path / "validation", imagenet, ids.class_names).parent, ids)
        assert [source.key(i) for i in range(5000)] == ids.keys
        assert source.name(0) == str(tmp_path / "validation" / ids.keys[0])
        assert source.image(0) == encoded(0, kind="JPEG")

    def test_tilde_is_the_home_folder(self, imagenet: Path, ids: ImageIds, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(imagenet))
        assert len(listed("~/val", ids)) == 5000 and len(class_folders("~")) == 1000

    def test_missing_class_folders_are_listed(self, tmp_path: Path, imagenet: Path, ids: ImageIds) -> None:
        gone = [ids.class_names[i] for i in (0, 500, 999)]
        folder = link_classes(tmp_path / "set", imagenet, sorted(set(ids.class_names) - set(gone)))
        with pytest.raises(UserError) as error:
            listed(folder, ids)
        assert str(error.value) == (
            f"expected the folders of all 1000 classes in {folder}, missing: {', '.join(gone)}."
        )

    def test_missing_files_are_counted_and_the_first_shown(self, tmp_path: Path, imagenet: Path, ids: ImageIds) -> None:
        emptied = set(ids.class_names[::250])
        folder = link_classes(tmp_path / "set", imagenet, sorted(set(ids.class_names) - emptied))
        for name in emptied:
            (folder / name).mkdir()
        gone = [key for key in ids.keys if key.split("/")[0] in emptied]
        assert len(gone) > 8  # the message does not show all
        with pytest.raises(UserError) as error:
            listed(folder, ids)
        assert f"expected the 5000 listed images in {folder}, {len(gone)} are missing: " in str(error.value)
        assert ", ".join(gone[:8]) in str(error.value) and gone[8] not in str(error.value)

    def test_flat_folder_of_imagenet(self, tmp_path: Path, ids: ImageIds) -> None:
        for key in ids.keys[:3]:
            (tmp_path / key.split("/")[1]).write_bytes(encoded(0, kind="JPEG"))
        for refused in (lambda: listed(tmp_path, ids), lambda: open_source(str(tmp_path), split="val")):
            with pytest.raises(UserError) as error:
                refused()
            for words in [str(tmp_path), "3 loose images of ImageNet's", "torchvision.datasets.ImageNet("]:
                assert words in str(error.value)
        assert class_folders(str(tmp_path)) == []

    def test_flat_folder_of_other_images(self, tmp_path: Path, ids: ImageIds) -> None:
        (tmp_path / "1.png").write_bytes(encoded(1))
        with pytest.raises(UserError, match="^.*found none, and 1 loose images.$"):
            listed(tmp_path, ids)

    @pytest.mark.parametrize(("name", "found"), [("file", "a file"), ("nowhere", "nothing")])
    def test_no_folder(self, tmp_path: Path, ids: ImageIds, name: str, found: str) -> None:
        (tmp_path / "file").write_text("text")
        with pytest.raises(UserError, match=f"^expected a folder .*found {found} at {tmp_path}/{name}"):
            listed(tmp_path / name, ids)
        assert class_folders(str(tmp_path / name)) == []

    def test_only_training_images(self, tmp_path: Path, ids: ImageIds) -> None:
        write_folder(tmp_path / "train", {ids.class_names[0]: 1})
        with pytest.raises(UserError, match="^expected val or validation with class folders"):
            listed(tmp_path, ids)
        assert class_folders(str(tmp_path)) == []


def test_class_folders_of_any_data_set(images: Path) -> None:
    assert class_folders(str(images)) == class_folders(str(images / "val")) == ["blue", "green", "grey", "red"]
    assert class_folders("digits") == []
