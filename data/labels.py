"""Assignment of folders and files to a network's classes: by name, by number, or by a file with the classes."""

from __future__ import annotations

import csv
import json
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torchvision.datasets.folder import IMG_EXTENSIONS

from common.errors import UserError, blame
from data.source import Source, StreamSource, some

Row = tuple[str, str, Any]  # the position in a file, the name of a folder or image, its class
_MANY = 10  # from this many folders with numbers as names on, classes may be missing among them
# Names of the columns in a header, in lower case, without _ and spaces.
_NAME_COLUMNS = ("file", "filename", "folder", "image", "imageid", "path")
_CLASS_COLUMNS = ("label", "class", "classid", "target", "wnid", "predictionstring")
_BOXES = re.compile(r"^(n\d{8})(\s+\d+){4}(\s+\1(\s+\d+){4})*$")  # a class with one bounding box or more


class Classes:
    """The classes of a network: their number, and their names if they are known."""

    def __init__(self, count: int, names: Sequence[str] | None, others: Sequence[str] = ()) -> None:
        """Store the classes; `others`: further names of the same classes, which files may use."""
        self.count = count
        self.names = list(map(str, range(count))) if names is None else list(names)
        self._places = {} if names is None else {name: place for place, name in enumerate(names)}
        self._others = {name: place for place, name in enumerate(others)}

    def know(self, names: Sequence[str]) -> bool:
        """Return whether all of these are names of classes."""
        return self._places.keys() >= set(names)

    def place(self, value: Any) -> int | None:
        """Return the class for a name or a number from 0 on; None if there is none.

        Text is first tried as a name: "3" is the class called 3 if there is one, else the class with that number.
        """
        for places in (self._places, self._others):
            if isinstance(value, str) and value in places:
                return places[value]
        number = int(value) if isinstance(value, str) and _is_number(value) else value
        return number if type(number) is int and 0 <= number < self.count else None

    def __str__(self) -> str:
        names = f", or a name such as {self.names[0]}" if self._places else ""
        return f"a class from 0 to {self.count - 1}{names}"


def named_by_numbers(source: Source | StreamSource, count: int) -> bool:
    """Return whether the class names are numbers whose order may differ from that of the network's `count` classes."""
    names = source.class_names or []
    if not names or not all(map(_is_number, names)):
        return False
    numbers = [int(name) for name in names]
    if numbers in ([*range(count)], [*range(1, count + 1)]):
        return False
    return numbers != sorted(numbers) or (source.of_folders and len(names) >= _MANY)


def classes_by_index(names: Sequence[str], classes: Classes) -> list[int]:
    """Return the class of each folder with a number as name: from 0 if there is a folder 0, from 1 if there is the last one.

    Raises:
        UserError: a folder's name is no number, too large a number or a duplicate; or it is unclear where the numbers start.
    """
    if others := [name for name in names if not _is_number(name)]:
        raise UserError(f"expected class folders named by numbers, found {some(others)}.")
    numbers = [int(name) for name in names]
    base, times = 0 if 0 in numbers else 1, Counter(numbers)
    if large := [name for name, number in zip(names, numbers) if number - base >= classes.count]:
        last = classes.count - 1 + base
        raise UserError(
            f"expected class folders from {base} to {last} for {classes.count} classes, found {some(large)}."
        )
    if same := [name for name, number in zip(names, numbers) if times[number] > 1]:
        raise UserError(f"expected one folder for each class, found {some(same)}.")
    if 0 not in numbers and max(numbers) < classes.count:
        raise UserError(
            f"expected a folder 0, or one called {classes.count}, because otherwise the numbers may start at 0 or at 1; "
            "give a file that maps each folder to its class."
        )
    return [number - base for number in numbers]


def in_natural_order(names: Sequence[str]) -> list[str]:
    """Sort names as people do: class2 before class10."""
    return sorted(
        names,
        key=lambda name: [(int(part), "") if _is_number(part) else (-1, part) for part in re.split(r"(\d+)", name)],
    )


def number_by_index(source: Source | StreamSource) -> None:
    """Renumber the classes of `source` by their names, if there are any, which must be all numbers from 0 on, or from 1 on.

    Raises:
        UserError: they are not.
    """
    if (names := source.class_names) is not None:
        source.relabel(classes_by_index(names, Classes(len(names), None)), sorted(names, key=int))


def classes_by_map(names: Sequence[str], path: Path, classes: Classes) -> list[int]:
    """Read the class of each folder from a file: {"folder": class} in JSON, or lines "folder class". It may list more folders.

    In JSON the two sides may be swapped, {"0": "folder"} or {"0": ["folder", "words"]} as in imagenet_class_index.json. The
    side with names of folders is taken as the folders.

    Raises:
        UserError: the file cannot be read, has a malformed or duplicate line, no line for one of `names`, or folders on both
            sides.
    """
    found = read_assignment(path, classes, dict(zip(names, names)).get, turn=True)
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{path}: expected a class for each folder, found none for {some(missing)}.")
    return [found[name][0] for name in names]


def read_assignment(
    path: Path, classes: Classes, find: Callable[[str], str | None], *, turn: bool = False
) -> dict[str, tuple[int, str]]:
    """Read folder or file → its class, and the position in `path` with this class.

    The file contains JSON, {"name": class}, or lines "name class", with or without a header. Lines of more than two columns
    need a header with one of `_NAME_COLUMNS` and one of `_CLASS_COLUMNS`. Bounding boxes may follow a class, as in Kaggle's
    LOC_val_solution.csv.

    Args:
        find: returns the data set's key of a folder or file of this name; None if it has none.
        turn: JSON may have the classes on the left, see `classes_by_map`.

    Raises:
        UserError: the file cannot be read, has a malformed line, or two lines for one folder or file.
    """
    found: dict[str, tuple[int, str]] = {}
    for where, name, value in _rows(path, classes, find, turn):
        with blame(where):
            name = posixpath.normpath(name)  # ./a.png is a.png
            key, place = find(name) or name, classes.place(value)
            if place is None:
                raise UserError(f"expected {classes} for {name}, got {value!r}.")
            if key in found:
                raise UserError(f"{key} already has a class, from {found[key][1]}.")
        found[key] = place, where
    if not found:
        raise UserError(f"{path}: expected at least one line with a class, found none.")
    return found


def _rows(path: Path, classes: Classes, find: Callable[[str], str | None], turn: bool) -> Iterable[Row]:
    try:
        path = path.expanduser().absolute()
        text = path.read_text("utf-8-sig", errors="surrogateescape")  # names of files need not be UTF-8
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}).") from error
    if text.lstrip().startswith("{"):
        rows = _json_rows(path, text)
        turned = _by_folder(path, rows, find) if turn else rows
        if turned is rows:
            _check_numbers(rows, classes)
        return turned

    def is_header(name: str, value: str) -> bool:
        """Return whether it is neither a malformed line of the data set nor one of a missing image."""
        no_class = classes.place(value) is None and re.search(r"\d", value) is None
        return no_class and not name.lower().endswith(IMG_EXTENSIONS) and find(name) is None

    return _table_rows(path, text, is_header)


def _table_rows(path: Path, text: str, is_header: Callable[[str, str], bool]) -> Iterator[Row]:
    lines, columns, width, first = text.splitlines(), [0, 1], 2, True
    rows = csv.reader(lines, skipinitialspace=True) if path.suffix.lower() == ".csv" else map(_split, lines)
    for number, row in enumerate(rows, 1):
        fields = [field.strip() for field in row]
        if not any(fields):
            continue
        if first and (header := _header_columns(fields)):
            columns, width, first = header, len(fields), False
            continue
        if len(fields) != width or not all(fields[column] for column in columns):
            expected = "a name and a class" if width == 2 else f"{width} columns, as in the first line"
            raise UserError(
                f"{path}, line {number}: expected {expected}, got {lines[number - 1].strip()!r}{_hint(fields, width)}."
            )
        name, value = (fields[column] for column in columns)
        if not (first and is_header(name, value)):
            yield f"{path}, line {number}", name, _BOXES.sub(r"\1", value)
        first = False


def _header_columns(fields: Sequence[str]) -> list[int] | None:
    """Return the columns of names and of classes if this is a header with exactly one of each; else None."""
    words = [re.sub(r"[ _]", "", field.lower()) for field in fields]
    found = [[i for i, word in enumerate(words) if word in known] for known in (_NAME_COLUMNS, _CLASS_COLUMNS)]
    return [column for (column,) in found] if all(len(columns) == 1 for columns in found) else None


def _hint(fields: Sequence[str], width: int) -> str:
    if len(fields) == 1 and _is_number(fields[0]):
        return "; numbers alone, as in ILSVRC's devkit, use the devkit's own order of classes, not that of the networks"
    if len(fields) > width == 2:
        one_of = " and ".join(f"one of {', '.join(known)}" for known in (_NAME_COLUMNS, _CLASS_COLUMNS))
        return f"; with more columns, the first line must be a header with {one_of}"
    return ""


def _json_rows(path: Path, text: str) -> list[Row]:
    try:
        pairs = json.loads(text, object_pairs_hook=list)  # a dict would drop duplicate folders
    except ValueError as error:
        raise UserError(f"{path}: expected JSON ({error}).") from error
    rows = []
    for number, (key, value) in enumerate(pairs, 1):
        with_words = isinstance(value, list) and [type(part) for part in value] == [str, str]
        rows.append((f"{path}, entry {number}", key, value[0] if with_words else value))
    return rows


def _check_numbers(rows: list[Row], classes: Classes) -> None:
    for where, name, value in rows:
        if type(value) is int and (place := classes.place(value)) not in (None, classes.place(str(value))):
            raise UserError(
                f"{where}: expected a name in quotes for {name}, because the network's class names are numbers: {value} may be "
                f"the class called {str(value)!r}, or the class at index {value}, {classes.names[place]!r}."
            )


def _by_folder(path: Path, rows: list[Row], find: Callable[[str], str | None]) -> list[Row]:
    """Return `rows`, with the sides swapped if the names are numbers and the values are the folders."""
    if not all(_is_number(name) and isinstance(value, str) for _, name, value in rows):
        return rows
    left, right = ([row[side] for row in rows if find(row[side])] for side in (1, 2))
    if left and right:
        raise UserError(
            f"{path}: expected folders on one side of its entries, found {left[0]!r} on the left and {right[0]!r} on the right; "
            'give classes as numbers without quotes, or lines "folder class".'
        )
    return [(where, value, int(name)) for where, name, value in rows] if right else rows


def _split(line: str) -> list[str]:
    """Split at the tab if there is one, else at the first comma or white space: names of classes may contain both."""
    return line.split("\t") if "\t" in line else re.split(r"[,\s]\s*", line.strip(), maxsplit=1)


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()
