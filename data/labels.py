"""Which class of a network a folder or a file is: by its name, by its number, or by a file that says so."""

from __future__ import annotations

import csv
import json
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from data.source import Source, StreamSource, some

_MANY = 10  # folders that are named by numbers


class Classes:
    """The classes of a network: how many, and their names where they are known."""

    def __init__(self, count: int, names: Sequence[str] | None) -> None:
        self.count = count
        self.names = list(map(str, range(count))) if names is None else list(names)
        self._places = {} if names is None else {name: place for place, name in enumerate(names)}

    def know(self, names: Sequence[str]) -> bool:
        """Whether all of these are names of classes."""
        return self._places.keys() >= set(names)

    def place(self, value: Any) -> int | None:
        """The class that a name or a number from 0 on means; None where there is none."""
        if isinstance(value, str) and value in self._places:
            return self._places[value]
        number = int(value) if isinstance(value, str) and _is_number(value) else value
        return number if type(number) is int and 0 <= number < self.count else None

    def __str__(self) -> str:
        names = f", or a name such as {self.names[0]}" if self._places else ""
        return f"a class from 0 to {self.count - 1}{names}"


def named_by_numbers(source: Source | StreamSource) -> bool:
    """Whether its classes are named by numbers, and their order may be another one than that of the numbers."""
    names = source.class_names or []
    if not names or not all(map(_is_number, names)):
        return False
    numbers = [int(name) for name in names]
    return numbers != sorted(numbers) or (source.of_folders and len(names) >= _MANY)


def classes_by_index(names: Sequence[str], classes: Classes) -> list[int]:
    """The class of each folder named by its number, from 0 on where there is a folder 0, else from 1 on.

    Raises:
        UserError: a folder has another name, a number that is too large, or that of another folder.
    """
    if others := [name for name in names if not _is_number(name)]:
        raise UserError(f"expected class folders named by numbers, found {some(others)}.")
    numbers = [int(name) for name in names]
    base, times = 0 if 0 in numbers else 1, Counter(numbers)
    if large := [name for name, number in zip(names, numbers) if number - base >= classes.count]:
        last = classes.count - 1 + base
        raise UserError(
            f"expected class folders from {base} to {last}, as the network has {classes.count} classes, found {some(large)}."
        )
    if same := [name for name, number in zip(names, numbers) if times[number] > 1]:
        raise UserError(f"expected one folder for each class, found {some(same)}.")
    return [number - base for number in numbers]


def classes_by_map(names: Sequence[str], path: Path, classes: Classes) -> list[int]:
    """The class of each folder as a file says: {"folder": class} in JSON, or lines "folder class"; it may hold more folders.

    Raises:
        UserError: the file cannot be read, has a bad or a second line for a folder, or none for one of `names`.
    """
    found = read_assignment(path, classes, set(names).__contains__)
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{path}: expected a class for each folder, found none for {some(missing)}.")
    return [found[name][0] for name in names]


def read_assignment(path: Path, classes: Classes, exists: Callable[[str], bool]) -> dict[str, tuple[int, str]]:
    """Folder or file → its class, and the place in `path` that says so. A first line of neither is taken for a header.

    Raises:
        UserError: the file cannot be read, has a bad line, or two for one folder or file.
    """
    found: dict[str, tuple[int, str]] = {}
    for line, (where, name, value) in enumerate(_pairs(path)):
        key = posixpath.normpath(name)  # ./a.png is a.png
        place = classes.place(value)
        if place is None:
            if line == 0 and not exists(key):
                continue
            raise UserError(f"{where}: expected {classes} for {key}, got {value!r}.")
        if key in found:
            raise UserError(f"{where}: {key} has a class already, by {found[key][1]}.")
        found[key] = place, where
    if not found:
        raise UserError(f"{path}: expected at least one line with a class, found none.")
    return found


def _pairs(path: Path) -> Iterator[tuple[str, str, Any]]:
    """(place in the file, name, what is said of it)."""
    try:
        text = path.expanduser().read_text("utf-8-sig", errors="surrogateescape")  # names of files need not be UTF-8
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}).") from error
    if text.lstrip().startswith("{"):
        yield from _json_pairs(path, text)
        return
    lines = text.splitlines()
    rows = csv.reader(lines, skipinitialspace=True) if path.suffix.lower() == ".csv" else map(_split, lines)
    for number, row in enumerate(rows, 1):
        fields = [field.strip() for field in row]
        if not any(fields):
            continue
        if len(fields) != 2 or not all(fields):
            raise UserError(f"{path}, line {number}: expected a name and a class, got {lines[number - 1].strip()!r}.")
        yield f"{path}, line {number}", *fields


def _json_pairs(path: Path, text: str) -> list[tuple[str, str, Any]]:
    try:
        pairs = json.loads(text, object_pairs_hook=list)  # a dict would lose a folder that is there twice
    except ValueError as error:
        raise UserError(f"{path}: expected JSON ({error}).") from error
    return [(f"{path}, entry {number}", key, value) for number, (key, value) in enumerate(pairs, 1)]


def _split(line: str) -> list[str]:
    """At the tab, where there is one, else at the first comma or white space: names of classes may hold both."""
    return line.split("\t") if "\t" in line else re.split(r"[,\s]\s*", line.strip(), maxsplit=1)


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()
