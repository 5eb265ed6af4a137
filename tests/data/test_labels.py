"""Files that say which class a folder or an image is, and folders named by numbers."""

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
        (["0007", "0100", "0999"], [6, 99, 998]),  # neither contiguous nor from 0 on
        (["0", "999"], [0, 999]),
    ],
)
def test_folder_k_is_class_k(names: list[str], expected: list[int]) -> None:
    assert classes_by_index(names, UNNAMED) == expected


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["0", "1000"], "from 0 to 999, as the network has 1000 classes, found 1000"),
        (["1", "1001"], "from 1 to 1000, as the network has 1000 classes, found 1001"),
        (["0", "1", "cats"], "named by numbers, found cats"),
        (["0", "-1"], "named by numbers, found -1"),
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
        ("a 0\n\na 1\nb 0\n", "line 3: a has a class already, by .*, line 1"),
        ("a 0\nb\n", "line 2: expected a name and a class, got 'b'"),
        ("a 0\n", "expected a class for each folder, found none for b"),
        ("", "expected at least one line"),
        ('{"a": 0, "b": 1, "a": 2}', "entry 3: a has a class already, by .*, entry 1"),
        ('{"a": 0, "b": true}', "entry 2: expected a class from 0 to 3, .*got True"),
        ('{"a": 0, "b": [1]}', "entry 2: expected a class from 0 to 3, .*got "),
        ('{"a": 0,', "expected JSON .*line 1"),
        (None, "cannot read .*No such file"),
    ],
)
def test_bad_maps_are_named_with_their_line(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "map").write_text(text)
    with pytest.raises(UserError, match=said) as error:
        classes_by_map(["a", "b"], tmp_path / "map", ANIMALS)
    assert str(tmp_path / "map") in str(error.value)


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
    ],
)
def test_images_with_a_list_of_labels(flat: Path, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    source = open_labelled(str(flat), tmp_path / name, ANIMALS)
    assert [source.key(i) for i in range(3)] == ["2.png", "1.png", "a b.png"] and len(source) == 3
    assert source.labels.tolist() == [2, 0, 1] and source.classes == [0, 1, 2] and source.num_classes == 4
    assert source.image(0) == encoded(1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1.png 0\n3.png 1\n", "labels.txt, line 2: expected an image in .*flat, there is no 3.png"),
        ("1.png 0\n3.png 1\n4.png 1\n", "line 2: .*there is no 3.png; missing in all: 2"),
        (f"1.png 0\n{'x' * 300}.png 1\n", "cannot read .*File name too long"),
        ("1.png 0\n2.png 1\n./1.png 1\n", "labels.txt, line 3: 1.png has a class already, by .*, line 1"),
        ("file label\n1.png dog\n", "labels.txt, line 2: expected a class"),
        ("file label\n", "expected at least one line"),
    ],
)
def test_bad_lists_are_named_with_their_line(flat: Path, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(UserError, match=said):
        open_labelled(str(flat), tmp_path / "labels.txt", ANIMALS)
