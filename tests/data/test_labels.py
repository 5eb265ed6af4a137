"""Files with the classes of folders or images, and folders with numbers as names."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import UserError
from data.folders import open_labelled
from data.labels import Classes, classes_by_index, classes_by_map
from tests.data import encoded

ANIMALS = Classes(4, ["tench, Tinca", "n02", "cat", "3"])  # the last name is no number
UNNAMED = Classes(1000, None)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([str(i) for i in range(1000)], list(range(1000))),
        (sorted(str(i) for i in range(1000)), sorted(range(1000), key=str)),
        (sorted(str(i) for i in range(1, 1001)), [int(name) - 1 for name in sorted(str(i) for i in range(1, 1001))]),
        (["0007", "0100", "1000"], [6, 99, 999]),  # neither contiguous nor starting at 0
        (["0", "999"], [0, 999]),
    ],
)
def test_folder_k_is_class_k(names: list[str], expected: list[int]) -> None:
    assert classes_by_index(names, UNNAMED) == expected


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["0", "1000"], "from 0 to 999 for 1000 classes, found 1000"),
        (["1", "1001"], "from 1 to 1000 for 1000 classes, found 1001"),
        (["0", "1", "cats"], "named by numbers, found cats"),
        (["0", "-1"], "named by numbers, found -1"),
        (["0007", "0100", "0999"], "expected a folder 0, or one called 1000"),
        (["1", "01", "2"], "one folder for each class, found 1, 01"),
    ],
)
def test_folders_that_are_no_class(names: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        classes_by_index(names, UNNAMED)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": "cat", "b c": 1, "d": "tench, Tinca", "more": "2", "e": "3"}',
        "folder\tclass\na\tcat\nb c\t1\nd\ttench, Tinca\n\ne\t3\n",
        '\ufeffa,cat\r\n"b c",1\r\nd,"tench, Tinca"\r\ne,3\r\n',
    ],
)
def test_a_map_of_folders(tmp_path: Path, text: str) -> None:
    path = tmp_path / ("map.csv" if "\r" in text else "map.txt")
    path.write_text(text, newline="")
    assert classes_by_map(["a", "b c", "d", "e"], path, ANIMALS) == [2, 1, 0, 3]


def test_lines_at_a_space_or_a_comma(tmp_path: Path) -> None:
    (tmp_path / "map").write_text("a tench, Tinca\nb,  n02\n")
    assert classes_by_map(["a", "b"], tmp_path / "map", ANIMALS) == [0, 1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a 0\nb dog\n", "line 2: expected a class from 0 to 3, or a name such as tench, Tinca for b, got 'dog'"),
        ("a 0\nb 4\n", "line 2: expected a class from 0 to 3, .*got '4'"),
        ("a dog\nb 0\n", "line 1: expected a class"),  # no header: there is such a folder
        ("a 0\n\na 1\nb 0\n", "line 3: a already has a class, from .*, line 1"),
        ("a 0\nb\n", "line 2: expected a name and a class, got 'b'"),
        ("a 0\n", "expected a class for each folder, found none for b"),
        ("", "expected at least one line"),
        ('{"a": 0, "b": 1, "a": 2}', "entry 3: a already has a class, from .*, entry 1"),
        ('{"a": 0, "b": true}', "entry 2: expected a class from 0 to 3, .*got True"),
        ('{"a": 0, "b": [1]}', "entry 2: expected a class from 0 to 3, .*got "),
        ('{"a": 0,', "expected JSON .*line 1"),
        (None, "cannot read .*No such file"),
    ],
)
def test_errors_in_maps_show_the_line(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "map").write_text(text)
    with pytest.raises(UserError, match=said) as error:
        classes_by_map(["a", "b"], tmp_path / "map", ANIMALS)
    assert str(tmp_path / "map") in str(error.value)


WNIDS = Classes(3, ["n01440764", "n01443537", "n01484850"])
INDEX = '{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"], "2": ["n01484850", "great_white_shark"]}'
SHORT = '{"0": "n01440764", "1": "n01443537", "2": "n01484850"}'


@pytest.mark.parametrize("text", [INDEX, SHORT])
@pytest.mark.parametrize(
    ("names", "classes", "expected"),
    [
        (["n01443537", "n01484850"], WNIDS, [1, 2]),
        (["n01443537", "n01484850"], Classes(3, None), [1, 2]),
        (["n01443537"], Classes(3, ["2", "1", "0"]), [1]),  # the file's 1 is a number, not the class of that name
        (["0", "2"], Classes(3, ["n01484850", "n01443537", "n01440764"]), [2, 0]),
    ],
)
def test_an_index_of_classes(
    tmp_path: Path, text: str, names: list[str], classes: Classes, expected: list[int]
) -> None:
    (tmp_path / "imagenet_class_index.json").write_text(text)
    assert classes_by_map(names, tmp_path / "imagenet_class_index.json", classes) == expected


@pytest.mark.parametrize(
    ("names", "text", "said"),
    [
        (["0", "n01440764"], SHORT, "found '0' on the left and 'n01440764' on the right"),
        (
            ["0", "1"],
            '{"0": "1", "1": "0"}',
            "found '0' on the left and '1' on the right; give classes as numbers without",
        ),
        (["n01440764", "zebra"], INDEX, "expected a class for each folder, found none for zebra"),
        (["crane"], '{"134": "crane", "517": "crane"}', "entry 2: crane already has a class, from .*entry 1"),
        (["n01440764"], '{"3": "n01440764"}', "entry 1: expected a class from 0 to 2.* for n01440764, got 3"),
    ],
)
def test_an_index_that_is_not_clear(tmp_path: Path, names: list[str], text: str, said: str) -> None:
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(UserError, match=said):
        classes_by_map(names, tmp_path / "map.json", Classes(3, None) if "crane" not in names else UNNAMED)


def test_numbers_in_quotes_are_names_first(tmp_path: Path) -> None:
    """The network's class names are numbers in another order."""
    classes, path = Classes(3, ["0", "10", "2"]), tmp_path / "map.json"
    path.write_text('{"a": 2, "b": "2", "c": "10", "d": "1"}')
    assert classes_by_map(["a", "b", "c", "d"], path, classes) == [2, 2, 1, 1]
    path.write_text('{"a": 1}')
    with pytest.raises(UserError, match="1 may be the class called '1', or the class at index 1, '2'"):
        classes_by_map(["a"], path, Classes(3, ["1", "2", "3"]))
    (tmp_path / "map").write_text("0 1\n1 2\n")  # lines are folder and class, whatever the folders are called
    assert classes_by_map(["0", "1"], tmp_path / "map", Classes(3, ["1", "2", "3"])) == [0, 1]


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    for i, name in enumerate(("1.png", "2.png", "a b.png", "unlisted.png")):
        (tmp_path / "flat").mkdir(exist_ok=True)
        (tmp_path / "flat" / name).write_bytes(encoded(i))
    return tmp_path / "flat"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.csv", "file,label\n2.png,cat\n1.png,0\na b.png,n02\n"),
        ("labels.csv", "./2.png, 2\n1.png, 0\na b.png, 1\n"),
        ("labels.txt", "2.png\tcat\n1.png\t0\na b.png\tn02\n"),
        ("labels.txt", "2\tcat\n1\t0\na b\tn02\n"),  # the first line is no header: there is a 2.png
        ("labels.csv", "name,category\n2,cat\n1,0\na b,n02\n"),
        ("labels.csv", ",Class_ID,x,ImageId\n0,2,,2\n1,0,,1\n2,n02,,a b\n"),
        ("labels.csv", "label,file\n2,2.png\n0,1.png\n1,a b.png\n"),
    ],
)
def test_images_with_a_list_of_labels(flat: Path, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    source = open_labelled(str(flat), tmp_path / name, ANIMALS)
    assert [source.key(i) for i in range(3)] == ["2.png", "1.png", "a b.png"] and len(source) == 3
    assert source.labels.tolist() == [2, 0, 1] and source.classes == [0, 1, 2] and source.num_classes == 4
    assert source.image(0) == encoded(1)


def test_kaggles_solution(flat: Path, tmp_path: Path) -> None:
    """Ids without endings, classes with the boxes of the objects."""
    path, names = tmp_path / "LOC_val_solution.csv", ["n01440764", "n03995372"]
    path.write_text(
        "ImageId,PredictionString\n2,n03995372 85 1 499 272 \n1,n01440764 0 0 9 9 n01440764 1 1 5 5 \na b,n03995372 1 2 3 4\n"
    )
    source = open_labelled(str(flat), path, Classes(2, names))
    assert [source.key(i) for i in range(3)] == ["2.png", "1.png", "a b.png"] and source.labels.tolist() == [1, 0, 1]
    path.write_text("ImageId,PredictionString\n1,n01440764 0 0 9 9 n03995372 1 1 5 5\n")
    with pytest.raises(UserError, match="line 2: expected a class .*got 'n01440764 0 0 9 9 n03995372 1 1 5 5'"):
        open_labelled(str(flat), path, Classes(2, names))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1.png 0\n3.png 1\n", "labels.txt, line 2: expected an image in .*flat, there is no 3.png"),
        ("1.png 0\n3.png 1\n4.png 1\n", "line 2: .*there is no 3.png; missing in total: 2"),
        (f"1.png 0\n{'x' * 300}/1.png 1\n", "cannot read .*File name too long"),
        ("1.png 0\n2.png 1\n./1.png 1\n", "labels.txt, line 3: 1.png already has a class, from .*, line 1"),
        ("file label\n1.png dog\n", "labels.txt, line 2: expected a class"),
        ("file label\n", "expected at least one line"),
        ("missing.png 2000\n1.png 0\n", "line 1: expected a class from 0 to 3, .* for missing.png, got '2000'"),
        ("missing.png dog\n1.png 0\n", "line 1: expected a class .*got 'dog'"),
        ("missing n99999999\n1.png 0\n", "line 1: expected a class .*got 'n99999999'"),
        ("1 dog\n1.png 0\n", "line 1: expected a class .*got 'dog'"),  # there is a 1.png
        ('{"missing": "dog", "1.png": 0}', "entry 1: expected a class .*got 'dog'"),
        (
            "490\n361\n",
            "line 1: expected a name and a class, got '490'; numbers alone, as in ILSVRC's devkit, use the devkit's own order",
        ),
        (
            "1.png 0\nsub/../../other/2.png 1\n",
            "line 2: expected an image in .*flat, got ../other/2.png, which is outside of it",
        ),
        ("/etc/1.png 0\n", "line 1: expected an image in .*flat, got /etc/1.png, which is outside of it"),
        ("1 0\n1.png 0\n", "line 2: 1.png already has a class, from .*, line 1"),
        ("a.b 0\n", "line 1: expected one image called a.b in .*flat, found a.b.JPEG, a.b.png"),
        (
            "1.png\t0\tcat\n",
            "line 1: expected a name and a class, got .*; with more columns, .* one of file, .* one of label, ",
        ),
        ("1.png n02 1 2 3 4 cat 1 2 3 4\n", "line 1: expected a class .*got 'n02 1 2 3 4 cat"),
    ],
)
def test_errors_in_lists_show_the_line(flat: Path, tmp_path: Path, text: str, said: str) -> None:
    for name in ("a.b.png", "a.b.JPEG"):
        (flat / name).write_bytes(encoded(0))
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(UserError, match=said):
        open_labelled(str(flat), tmp_path / "labels.txt", ANIMALS)
