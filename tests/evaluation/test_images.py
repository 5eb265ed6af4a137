"""Which images an evaluation takes, in which order, with which labels, and their pixels."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.errors import UserError
from data.imagenet_ids import ImageIds, imagenet_classes
from data.source import Source
from data.transforms import eval_transform
from evaluation.config import EvalDataConfig
from evaluation.images import Chunk, ImageList, open_images
from tests.data import encoded
from tests.data.test_imagenet_ids import installed_list, link_classes, write_imagenet
from tests.data.test_loader import write_parquet, write_shards
from tests.training.helpers import CLASSES, write_images
from zoo.description import Preprocessing


@pytest.fixture(scope="module")
def ids() -> ImageIds:
    return installed_list()


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory, ids: ImageIds) -> Path:
    """ImageNet's validation folder with the listed images and one that is not on the list."""
    folder = write_imagenet(tmp_path_factory.mktemp("imagenet"), ids)
    os.link(folder / "image.JPEG", folder / "val" / ids.class_names[0] / "unlisted.JPEG")
    return folder


@pytest.fixture
def copy(images: Path, tmp_path: Path) -> Path:
    """A validation folder that may be changed."""
    return Path(shutil.copytree(images / "val", tmp_path / "copy"))


def opened(
    spec: object,
    *,
    ids: str = "auto",
    n_ex: int = 0,
    num_classes: int = 4,
    class_names: list[str] | None = None,
    **options: object,
) -> ImageList:
    data = EvalDataConfig(val_dataset=str(spec), **options)
    return open_images(data, ids=ids, n_ex=n_ex, num_classes=num_classes, class_names=class_names)


def read(images: ImageList, positions: list[int] | None = None, size: int = 16, crop_pct: float = 1.0) -> Chunk:
    return images.read(list(range(len(images))) if positions is None else positions, Preprocessing(size, crop_pct))


class TestWhichImages:
    def test_auto_takes_the_list_where_the_folder_is_imagenet(self, imagenet: Path, ids: ImageIds) -> None:
        for images in (opened(imagenet, num_classes=1000), opened(imagenet, ids="robustbench", num_classes=1000)):
            assert images.keys == ids.keys
            assert images.labels == [ids.class_names.index(key.split("/")[0]) for key in ids.keys]

    def test_all_takes_what_is_not_on_the_list_too(self, imagenet: Path, ids: ImageIds) -> None:
        images = opened(imagenet, ids="all", num_classes=1000)
        assert set(images.keys) - set(ids.keys) == {f"{ids.class_names[0]}/unlisted.JPEG"}
        assert len(images) == len(set(images.keys)) == 5001

    def test_turned_photos_stand_upright_but_in_robustbenchs_list(
        self, imagenet: Path, images: Path, copy: Path
    ) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # a quarter turn
        photo = Image.open(io.BytesIO(encoded(1, 40, 40)))
        photo.save(copy / "blue" / "0.jpg", quality=95, exif=exif)
        lying = Image.open(copy / "blue" / "0.jpg").convert("RGB")
        found = opened(copy)
        place = found.keys.index("blue/0.jpg")
        expected = eval_transform(16, 1.0)(lying.transpose(Image.Transpose.ROTATE_270))
        assert torch.equal(read(found, [place]).x[0], expected)
        listed = ImageList(found.source, found.indices, robustbench=True)
        assert torch.equal(read(listed, [place]).x[0], eval_transform(16, 1.0)(lying))
        assert opened(imagenet, num_classes=1000).robustbench and not found.robustbench

    def test_auto_takes_all_where_it_is_not_imagenet(self, images: Path) -> None:
        expected = sorted(f"{name}/{i}.png" for name in CLASSES for i in (0, 1))
        assert sorted(opened(images).keys) == sorted(opened(images, ids="all").keys) == expected
        assert opened(images).keys == opened(images / "val").keys

    def test_auto_does_not_take_an_incomplete_imagenet_for_another_data_set(
        self, tmp_path: Path, imagenet: Path, ids: ImageIds
    ) -> None:
        most = link_classes(tmp_path / "most", imagenet, ids.class_names[:-2])
        with pytest.raises(
            UserError, match=f"data.val_dataset: .*all 1000 .*{', '.join(ids.class_names[-2:])}"
        ) as error:
            opened(most, num_classes=1000)
        assert "--eval.ids=all" in str(error.value)
        found = opened(most, ids="all", num_classes=1000)  # what the message recommends
        assert all(ids.class_names[label] == key.split("/")[0] for key, label in zip(found.keys, found.labels))
        hundred = link_classes(tmp_path / "hundred", imagenet, ids.class_names[:100])
        found = sum(key.split("/")[0] in ids.class_names[:100] for key in ids.keys) + 1
        assert len(opened(hundred, num_classes=100)) == found

    @pytest.mark.parametrize("spec", ["images", "digits", "nowhere"])
    def test_robustbench_needs_imagenet(self, images: Path, ids: ImageIds, spec: str) -> None:
        with pytest.raises(UserError, match="^data.val_dataset: expected ") as error:
            opened(images if spec == "images" else spec, ids="robustbench")
        assert ("missing: n01440764" in str(error.value)) == (spec == "images")


class TestOrder:
    @pytest.mark.parametrize("name", ["list", "folder", "tar", "digits", "stream"])
    def test_fewer_images_are_the_beginning_of_more(
        self, request: pytest.FixtureRequest, images: Path, tmp_path: Path, name: str
    ) -> None:
        if name == "list":
            spec, classes = request.getfixturevalue("imagenet"), 1000
        elif name == "folder":
            spec, classes = images / "train", 4
        elif name == "tar":
            spec, classes = tmp_path / "images.tar", 4
            with tarfile.open(spec, "w") as tar:
                tar.add(images / "train", arcname=".")
        elif name == "digits":
            pytest.importorskip("sklearn", reason="needs scikit-learn")
            spec, classes = "digits", 10
        else:
            pytest.importorskip("webdataset", reason="wds/ needs the package webdataset")
            spec, classes = f"wds/{write_shards(tmp_path / 'Shards')}", 24
        some = {n: opened(spec, n_ex=n, num_classes=classes) for n in (3, 6, 10**6, 0)}
        for fewer, more in [(3, 6), (6, 0), (10**6, 0)]:
            n = len(some[fewer])
            assert some[fewer].keys == some[more].keys[:n] and some[fewer].labels == some[more].labels[:n]
        assert [len(some[n]) for n in (3, 6)] == [3, 6] and len(some[0]) == len(some[10**6]) > 6

    def test_class_folders_are_shuffled_and_always_alike(self, images: Path) -> None:
        shuffled = opened(images / "train")
        assert len(set(shuffled.labels[:6])) > 1  # sorted, the first six would all be blue
        assert shuffled.labels == [CLASSES.index(key.split("/")[0]) for key in shuffled.keys]
        # Results on the first n images can only be compared if these stay the same in every version of the project.
        assert shuffled.indices[:12] == [15, 8, 21, 16, 11, 10, 17, 13, 9, 22, 2, 7]

    def test_order_does_not_depend_on_the_numbers_of_the_classes(self, images: Path) -> None:
        mixed = ["grey", "blue", "red", "green"]
        renumbered = opened(images / "train", class_names=mixed)
        assert renumbered.keys == opened(images / "train").keys
        assert renumbered.labels == [mixed.index(key.split("/")[0]) for key in renumbered.keys]

    def test_mixed_data_sets_keep_their_order(self, ids: ImageIds, imagenet: Path) -> None:
        pytest.importorskip("sklearn", reason="needs scikit-learn")
        digits = opened("digits", n_ex=20, num_classes=10)
        assert digits.indices == list(range(20)) and len(set(digits.labels)) > 5
        assert opened(imagenet, n_ex=20, num_classes=1000).keys == ids.keys[:20]


class TestLabels:
    def test_a_missing_class_folder_does_not_shift_labels(self, copy: Path) -> None:
        shutil.rmtree(copy / "blue")
        found = opened(copy, class_names=list(CLASSES))
        assert sorted(found.labels) == [1, 1, 2, 2, 3, 3]
        assert found.labels == read(found).y.tolist() == [CLASSES.index(key.split("/")[0]) for key in found.keys]

    def test_without_names_every_class_needs_a_folder(self, copy: Path) -> None:
        shutil.rmtree(copy / "blue")
        with pytest.raises(UserError, match="^model.num_classes: the head has 4 classes, data.val_dataset has 3[.]"):
            opened(copy)
        (copy / "blue").mkdir()  # what the message recommends
        assert sorted(opened(copy).labels) == [1, 1, 2, 2, 3, 3]

    @pytest.mark.parametrize("num_classes", [3, 5, 1000])
    def test_another_head(self, images: Path, num_classes: int) -> None:
        with pytest.raises(UserError, match=f"the head has {num_classes} classes, data.val_dataset has 4[.]"):
            opened(images, num_classes=num_classes)

    def test_a_class_that_the_network_does_not_know(self, images: Path) -> None:
        with pytest.raises(UserError, match="^data.val_dataset: .*red.*blue, green, grey"):
            opened(images, num_classes=3, class_names=["blue", "green", "grey"])

    def test_the_list_is_matched_by_name_too(self, imagenet: Path, ids: ImageIds) -> None:
        names = ["another", *reversed(ids.class_names)]
        plain = opened(imagenet, num_classes=1000)
        assert opened(imagenet, num_classes=1000, class_names=ids.class_names).labels == plain.labels
        matched = opened(imagenet, num_classes=1001, class_names=names)
        assert matched.labels == [1000 - label for label in plain.labels] and matched.keys == plain.keys

    def test_the_list_and_other_networks(self, imagenet: Path, ids: ImageIds) -> None:
        with pytest.raises(
            UserError, match="^model.num_classes: the head has 10 classes, data.val_dataset has 1000[.]"
        ):
            opened(imagenet, num_classes=10)
        missing = f"training set does not have: {ids.class_names[5]}. Expected names among its 999 .*--eval.ids=all"
        with pytest.raises(UserError, match=f"^data.val_dataset: .*{missing}"):
            opened(imagenet, num_classes=999, class_names=ids.class_names[:5] + ids.class_names[6:])


def write_classes(folder: Path, names: list[str]) -> Path:
    """A class folder with one image, the same one, for each name."""
    folder.mkdir(parents=True)
    (folder / "image").write_bytes(encoded(0))
    for name in names:
        (folder / name).mkdir()
        os.link(folder / "image", folder / name / "0.png")
    (folder / "image").unlink()
    return folder


class TestOwnClasses:
    @pytest.mark.parametrize("base", [0, 1])
    @pytest.mark.parametrize("packed", [False, True])
    def test_imagenetv2s_folders(self, tmp_path: Path, base: int, packed: bool) -> None:
        folder = write_classes(tmp_path / "imagenetv2", [str(i + base) for i in range(1000)])
        if packed:
            with tarfile.open(tmp_path / "set.tar", "w") as tar:
                tar.add(folder, arcname="set")
            folder = tmp_path / "set.tar"
        for names in (None, imagenet_classes()):
            with pytest.raises(UserError, match="^data.val_dataset: .*found 1000 numbers") as error:
                opened(folder, num_classes=1000, class_names=names)
            assert "--data.classes=index" in str(error.value) and "--data.class_map=FILE" in str(error.value)
            found = opened(folder, num_classes=1000, class_names=names, classes="index")
            assert found.labels == [int(Path(key).parent.name) - base for key in found.keys]

    def test_numbers_that_are_the_names_of_the_networks_classes(self, tmp_path: Path) -> None:
        """As of a network that was trained on such folders."""
        names = sorted(str(i) for i in range(12))
        folder = write_classes(tmp_path / "set", names)
        found = opened(folder, num_classes=12, class_names=names)
        assert found.labels == [names.index(key.split("/")[0]) for key in found.keys]
        shutil.rmtree(folder / "10")
        with pytest.raises(UserError, match="found 11 numbers"):
            opened(folder, num_classes=11)

    def test_few_numbers_are_names_like_others(self, tmp_path: Path) -> None:
        found = opened(write_classes(tmp_path / "set", ["1", "2", "3"]), num_classes=3)
        assert found.labels == [int(key[0]) - 1 for key in found.keys]
        with pytest.raises(UserError, match="found 3 numbers"):
            opened(write_classes(tmp_path / "other", ["1", "10", "2"]), num_classes=3)
        found = opened(write_classes(tmp_path / "all", [f"{i:02d}" for i in range(12)]), num_classes=12)
        assert found.labels == [
            int(key[:2]) for key in found.keys
        ]  # the order of names is that of numbers, none is missing

    def test_some_of_imagenets_classes_are_matched_by_name(self, tmp_path: Path) -> None:
        wnids = imagenet_classes()
        few = write_classes(tmp_path / "few", wnids[7::100])
        found = opened(few, num_classes=1000)
        assert sorted(found.labels) == list(range(7, 1000, 100)) == found.source.classes
        assert all(wnids[label] == key.split("/")[0] for key, label in zip(found.keys, found.labels))
        (few / "zebra").mkdir()
        with pytest.raises(
            UserError, match="^model.num_classes: the head has 1000 .* has 11[.].*not in ImageNet: zebra"
        ):
            opened(few, num_classes=1000)
        shutil.rmtree(few / "zebra")
        with pytest.raises(UserError, match="^model.num_classes: the head has 50 classes, data.val_dataset has 10[.]"):
            opened(few, num_classes=50)  # of another network

    def test_names_in_words_beside_imagenets_folders(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        few = write_classes(tmp_path / "few", imagenet_classes()[7::100])
        words = [f"word {i}" for i in range(1000)]
        assert sorted(opened(few, num_classes=1000, class_names=words).labels) == list(range(7, 1000, 100))
        assert "class names are words (word 0" in capsys.readouterr().err
        with pytest.raises(UserError, match="classes that the training set does not have: n0"):
            opened(few, num_classes=900, class_names=words[:900])

    def test_folders_in_words_for_a_thousand_classes(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = write_classes(tmp_path / "words", [f"word {i:03}" for i in range(1000)])
        opened(folder, num_classes=1000)
        assert "(word 000, word 001, " in (said := capsys.readouterr().err) and "numbered by their sorted names" in said

    @pytest.mark.parametrize("names", [["class1", "class10", "class2"], ["1_cat", "10_dog", "2_owl"]])
    def test_folders_whose_order_people_read_otherwise(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str]
    ) -> None:
        opened(write_classes(tmp_path / "set", names), num_classes=3)
        assert "numbered by their sorted names" in capsys.readouterr().err
        opened(tmp_path / "set", num_classes=3, class_names=names)
        opened(write_classes(tmp_path / "other", ["class1", "class2", "class3"]), num_classes=3)
        assert capsys.readouterr().err == ""

    def test_empty_folders_are_no_classes_of_the_images(self, tmp_path: Path) -> None:
        folder = write_classes(tmp_path / "set", ["a", "c"])
        (folder / "b").mkdir()
        assert opened(folder, num_classes=3).classes == (0, 2)

    def test_labels_by_wnid_for_a_network_that_names_its_classes_in_words(self, tmp_path: Path) -> None:
        folder = write_classes(tmp_path / "set", ["x"]) / "x"
        (tmp_path / "labels.csv").write_text(f"0.png,{imagenet_classes()[7]}\n")
        words = [f"word {i}" for i in range(1000)]
        assert opened(folder, num_classes=1000, class_names=words, labels=tmp_path / "labels.csv").labels == [7]

    def test_a_map_of_folders(self, copy: Path, tmp_path: Path) -> None:
        (tmp_path / "map.json").write_text('{"blue": 3, "green": "b", "grey": 3, "red": 0}')
        found = opened(copy, class_names=["a", "b", "c", "d"], class_map=tmp_path / "map.json")
        expected = {"blue": 3, "green": 1, "grey": 3, "red": 0}
        assert found.labels == read(found).y.tolist() == [expected[key.split("/")[0]] for key in found.keys]
        with pytest.raises(
            UserError, match="^data.class_map: .*map.json, entry 2: expected a class from 0 to 999, or a"
        ):
            opened(copy, num_classes=1000, class_map=tmp_path / "map.json")

    def test_a_list_of_labels(self, copy: Path, tmp_path: Path) -> None:
        """Images without class folders, for a network that knows ImageNet's names."""
        (tmp_path / "labels.csv").write_text("file,label\n1.png,n15075141\n0.png,999\n")
        found = opened(copy / "blue", num_classes=1000, labels=tmp_path / "labels.csv")
        assert sorted(found.keys) == ["0.png", "1.png"] and found.labels == [999, 999]
        with pytest.raises(
            UserError, match="^data.labels: .*labels.csv, line 2: expected a class from 0 to 3 for 1.png, got 'n15"
        ):
            opened(copy / "blue", labels=tmp_path / "labels.csv")
        for name in ("0.png", "ILSVRC2012_val_00000001.JPEG"):
            (copy / "blue" / "0.png").rename(copy / "blue" / name)
            with pytest.raises(UserError, match="^data.val_dataset: .*loose images.* give --data.labels=FILE"):
                opened(copy / "blue")
        with pytest.raises(UserError, match="^data.labels: expected a folder .*found nothing at"):
            opened(copy / "nowhere", labels=tmp_path / "labels.csv")

    def test_index_needs_numbers_below_the_classes(self, images: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="^data.classes: expected class folders named by numbers, found blue, "):
            opened(images, classes="index")
        with pytest.raises(UserError, match="^data.classes: .*from 0 to 3 for 4 classes, found 4"):
            opened(write_classes(tmp_path / "set", list("01234")), classes="index")


class TestRead:
    @pytest.mark.parametrize(("size", "crop_pct"), [(16, 1.0), (28, 0.875)])
    def test_pixels_labels_and_positions(self, images: Path, size: int, crop_pct: float) -> None:
        found = opened(images)
        positions = [6, 1, 3]
        chunk = read(found, positions, size, crop_pct)
        assert chunk.positions.tolist() == positions and chunk.unreadable == []
        assert chunk.y.tolist() == [found.labels[p] for p in positions]
        assert (chunk.x.dtype, chunk.y.dtype, chunk.positions.dtype) == (torch.float32, torch.int64, torch.int64)
        transform = eval_transform(size, crop_pct)
        for x, p in zip(chunk.x, positions, strict=True):
            assert torch.equal(x, transform(Image.open(images / "val" / found.keys[p])))

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_an_undecodable_image_is_left_out_and_named(self, copy: Path, num_workers: int) -> None:
        whole = read(opened(copy))
        (copy / "green" / "1.png").write_bytes(b"garbage")
        found = opened(copy, num_workers=num_workers)
        gone = found.keys.index("green/1.png")
        chunk, kept = read(found), [p for p in range(8) if p != gone]
        assert chunk.positions.tolist() == kept and chunk.y.tolist() == [found.labels[p] for p in kept]
        assert torch.equal(chunk.x, whole.x[kept])
        (named,) = chunk.unreadable
        assert named.startswith(f"{copy}/green/1.png (ValueError: not an image")
        nothing = read(found, [gone])
        assert nothing.x.shape == (0, 3, 16, 16) and nothing.positions.tolist() == nothing.y.tolist() == []
        assert nothing.unreadable == [named]

    def test_workers_change_nothing(self, images: Path) -> None:
        for positions in ([4, 0, 7, 2, 5], [3]):  # three and two images; fewer images than workers
            one, two = (read(opened(images, num_workers=n), positions) for n in (0, 2))
            assert torch.equal(two.x, one.x) and torch.equal(two.y, one.y)
            assert two.positions.tolist() == one.positions.tolist() == positions and two.unreadable == []

    def test_every_worker_decodes(self) -> None:
        processes = {
            workers: {tuple(x[:, 0, 0].tolist()) for x in read(ImageList(_Processes(), list(range(8)), workers)).x}
            for workers in (0, 2)
        }
        assert len(processes[0]) == 1 and len(processes[2]) == 2 and not processes[0] & processes[2]


class _Processes(Source):
    """Images whose colour is the number of the process that opens them."""

    def __init__(self) -> None:
        super().__init__([0] * 8, ["a"])

    def image(self, i: int) -> Image.Image:
        return Image.new("RGB", (16, 16), tuple(os.getpid().to_bytes(4, "big")[1:]))

    def name(self, i: int) -> str:
        return str(i)


class TestIdentity:
    def test_digest_does_not_depend_on_the_place(self, images: Path, copy: Path) -> None:
        assert opened(copy).digest() == opened(images).digest() == opened(images / "val").digest()

    def test_digest_depends_on_names_labels_and_order(self, images: Path, copy: Path) -> None:
        found = opened(images)
        digests = {
            found.digest(),
            opened(images, n_ex=7).digest(),
            opened(images, class_names=["red", "green", "grey", "blue"]).digest(),
            ImageList(found.source, found.indices[::-1]).digest(),
        }
        (copy / "red" / "0.png").rename(copy / "red" / "2.png")
        assert len(digests | {opened(copy).digest()}) == 5

    @pytest.mark.parametrize("kind", ["tar", "torch", "wds", "hfds"])
    def test_digest_of_other_sources_does_not_depend_on_the_place(
        self, images: Path, tmp_path: Path, kind: str
    ) -> None:
        digests, names = set(), set()
        for place in (tmp_path / "here", tmp_path / "there"):
            place.mkdir()
            if kind == "tar":
                with tarfile.open(place / "images.tar", "w") as tar:
                    tar.add(images / "val", arcname=".")
                found = opened(place / "images.tar")
            elif kind == "torch":
                shutil.copytree(images / "val", place / "validation")
                found = opened("torch/image_folder", root=str(place))
            elif kind == "wds":
                pytest.importorskip("webdataset", reason="wds/ needs the package webdataset")
                found = opened(f"wds/{write_shards(place / 'Shards')}", num_classes=24)
            else:
                pytest.importorskip("datasets", reason="hfds/ needs the package datasets")
                spec = f"hfds/{write_parquet(place / 'Set')}"
                found = opened(spec, num_classes=24, root=str(tmp_path / "cache"), val_split="train")
            digests.add(found.digest())
            names.add(found.source.name(0))
            assert len(set(found.keys)) == len(found)
        assert len(digests) == 1 and len(names) == 2

    def test_digest_of_names_that_are_not_utf_8(self, copy: Path) -> None:
        before = opened(copy).digest()
        os.rename(copy / "red" / "0.png", os.fsencode(copy / "red") + b"/\xff.png")
        found = opened(copy)
        assert found.digest() != before and len(read(found).x) == 8

    def test_probe_tells_pixels_apart(self, images: Path, copy: Path) -> None:
        before = opened(images).probe(Preprocessing(16, 1.0))
        assert opened(copy, num_workers=2).probe(Preprocessing(16, 1.0)) == before
        with Image.open(copy / "grey" / "0.png") as image:
            image.rotate(90).save(copy / "grey" / "0.png")
        assert opened(copy).digest() == opened(images).digest()
        assert opened(copy).probe(Preprocessing(16, 1.0)) != before
        assert opened(images).probe(Preprocessing(16, 0.875)) != before


class TestStreams:
    @pytest.fixture
    def shards(self, tmp_path: Path) -> Path:
        pytest.importorskip("webdataset", reason="wds/ needs the package webdataset")
        return write_shards(tmp_path / "Shards")

    def test_same_images_every_time(self, shards: Path) -> None:
        first, again = (opened(f"wds/{shards}", num_classes=24, n_ex=7) for _ in range(2))
        assert first.labels == again.labels == list(range(7))
        assert first.keys == again.keys and first.digest() == again.digest()
        chunks = [read(first), read(first), read(again)]
        chunks.append(read(opened(f"wds/{shards}", num_classes=24, n_ex=7, num_workers=2)))
        for chunk in chunks:
            assert chunk.positions.tolist() == chunk.y.tolist() == list(range(7))
            assert torch.equal(chunk.x, chunks[0].x)
        for i, x in enumerate(chunks[0].x):
            jpeg = Image.open(io.BytesIO(encoded(i, kind="JPEG")))
            assert torch.equal(x, eval_transform(16, 1.0)(jpeg.convert("RGB")))

    def test_zero_takes_all(self, shards: Path) -> None:
        found = opened(f"wds/{shards}", num_classes=24)
        assert found.labels == list(range(24)) and read(found, [23]).y.tolist() == [23]

    def test_classes_that_are_only_numbers(self, shards: Path) -> None:
        names = [f"class {i}" for i in range(24)]
        assert opened(f"wds/{shards}", num_classes=24, class_names=names, n_ex=3).labels == [0, 1, 2]
        assert len(opened(f"wds/{shards}", num_classes=30, n_ex=3)) == 3  # nothing says which classes are missing
        with pytest.raises(UserError, match="the head has 10 classes, data.val_dataset has 24[.]"):
            opened(f"wds/{shards}", num_classes=10, n_ex=3)

    def test_an_empty_stream(self, shards: Path) -> None:
        for path in shards.glob("*.tar"):
            with tarfile.open(path, "w"):
                pass
        with pytest.raises(UserError, match=f"wds/{shards}: expected at least one image, found none"):
            opened(f"wds/{shards}", num_classes=24)


def test_a_data_set_that_vanishes_is_no_set_of_broken_images(tmp_path):
    write_images(tmp_path)
    data = EvalDataConfig(val_dataset=str(tmp_path))
    listed = open_images(data, ids="all", n_ex=0, num_classes=4, class_names=None)
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(RuntimeError, match="cannot be read .No such file or directory"):
        listed.read([0, 1], Preprocessing(32, 1))
