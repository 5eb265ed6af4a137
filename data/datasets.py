"""Sources of images: folder, tar, digits, torchvision, Hugging Face, and timm's streaming readers.

`open_source` turns a flag's value into one of two types:

- a `Source`: random access; `read(i)` returns image i, encoded if possible, and its label;
- a `StreamSource` (`tfds/`, `hfids/`, and `wds/` without an index): samples in the order of timm's reader.

To add a source, write a function from `Request` to one of them and add it to `_OPENERS`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.errors import UserError
from data.folders import hidden, open_path
from data.memory import Once, alone, load_into_memory
from data.shards import open_shards
from data.source import Request, Source, StreamSource, some

_SPLIT_NAMES = {"train": "train", "val": "validation"}
_REMOTE = ("http://", "https://", "gs://")  # read through curl and gsutil, which receive the address as one argument
_STREAM_PACKAGES = {  # what to import, what to install
    "wds": ("webdataset", "webdataset"),
    "hfids": ("datasets", "datasets"),
    "tfds": ("tensorflow_datasets", "tensorflow tensorflow-datasets"),
}


def open_source(
    spec: str,
    *,
    split: str,
    root: str = "",
    split_name: str = "",
    class_names: list[str] | None = None,
    in_memory: bool = False,
    once: Once = alone,
    progress: bool = False,
) -> Source | StreamSource:
    """Open the images given by `spec`. Classes are numbered by sorted name, or as the data set numbers them.

    Args:
        spec: a folder of class folders, or one that holds such folders as `train/` and `val/` (or `validation/`);
            a `.tar` of class folders; `digits`; `hfds/NAME`, `hfids/NAME`, `tfds/NAME`, `torch/NAME`, `wds/FOLDER`,
            `wds/http://…`, `wds/https://…`, `wds/gs://…` (the address of a folder of shards).
            For a folder with one of these names write `./digits`. Links are followed, in a .tar only those to files in
            it. A link to a folder that contains the link is skipped.
        split: "train" or "val".
        root: where hfds, hfids, tfds and torch store their files.
        split_name: the split's name in those data sets and in wds; by default train or validation.
        class_names: class names of the training set; labels become its numbers, matched by class name.
        in_memory: keep the encoded images in memory that processes and workers share.
        once: runs this in one process of this machine for all of its processes, which call this together.
        progress: show a bar while loading into memory.

    Raises:
        UserError: nothing is found there, or it has another layout; a package is missing; a class is unknown to
            the training set; not enough memory.
    """
    request = Request(spec, split, root, split_name or _SPLIT_NAMES[split])
    source = _opener(request)(request)
    if class_names is not None:
        match_classes(source, class_names, spec)
    if not in_memory:
        return source
    if isinstance(source, StreamSource):
        raise UserError(f"{spec} is a stream, which cannot be kept in memory. Use a folder, or turn in_memory off.")
    return load_into_memory(source, request, once=once, progress=progress)


def match_classes(source: Source | StreamSource, class_names: list[str], spec: str) -> None:
    """Renumber the classes of `source`, opened as `spec`, by the indices of their names in `class_names`, if they have names.

    Raises:
        UserError: a class is not in `class_names`.
    """
    if source.class_names is None or class_names == source.class_names:
        return
    unknown = sorted(set(source.class_names) - set(class_names))
    if unknown:
        raise UserError(
            f"{spec} has classes that the training set does not have: {some(unknown)}. Expected names among its "
            f"{len(class_names)} classes: {some(class_names)}."
        )
    source.relabel([class_names.index(name) for name in source.class_names], class_names)


class _Digits(Source):
    def __init__(self, images: np.ndarray, labels: np.ndarray, what: str) -> None:
        super().__init__(labels, [str(digit) for digit in range(10)])
        self._images, self._what = images, what

    def image(self, i: int) -> Image.Image:
        return Image.fromarray(self._images[i]).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")

    def name(self, i: int) -> str:
        return f"{self._what}[{i}]"


def _open_digits(request: Request) -> Source:
    """Open scikit-learn's 1,797 handwritten digits, 8×8 pixels, 17 greys; 360 of them, stratified, are for validation."""
    digits = request.require("sklearn.datasets", "scikit-learn").load_digits()
    split = request.require("sklearn.model_selection", "scikit-learn").train_test_split
    train, val = split(range(len(digits.target)), test_size=360, random_state=0, stratify=digits.target)
    rows = train if request.split == "train" else val
    images = np.rint(digits.images[rows] * (255 / 16)).astype(np.uint8)
    return _Digits(images, digits.target[rows], f"digits {request.split}")


class _Torchvision(Source):
    def __init__(self, spec: str, dataset: Any) -> None:
        # Only INaturalist has no targets; QMNIST's have further columns; ImageNet's classes are tuples of synonyms.
        labels = dataset.targets if hasattr(dataset, "targets") else [label for label, _ in dataset.index]
        names = dataset.classes if hasattr(dataset, "classes") else dataset.all_categories
        names = [name if isinstance(name, str) else ", ".join(name) for name in names]
        labels, files = np.asarray(labels).reshape(len(dataset), -1)[:, 0], getattr(dataset, "samples", None)
        if files:
            shown = [i for i, (path, _) in enumerate(files) if not hidden(os.path.relpath(path, dataset.root))]
            labels, files = labels[shown], [files[i] for i in shown]
        super().__init__(labels, names)
        self._spec, self._dataset, self._files = spec, dataset, files

    def image(self, i: int) -> bytes | Image.Image:
        return Path(self._files[i][0]).read_bytes() if self._files else self._dataset[i][0]

    def name(self, i: int) -> str:
        return self._files[i][0] if self._files else f"{self._spec}[{i}]"

    def key(self, i: int) -> str:
        return os.path.relpath(self._files[i][0], self._dataset.root) if self._files else self.name(i)


def _open_torchvision(request: Request) -> Source:
    from timm.data import create_dataset  # slow to import

    try:
        dataset = create_dataset(request.spec, root=request.root or ".", split=request.split_name)
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"expected a data set that timm knows as {request.spec}, downloaded to root ({request.root or '.'}); "
            f"its split {request.split_name} cannot be opened ({error})."
        ) from error
    return _Torchvision(request.spec, dataset)


class _HuggingFace(Source):
    def __init__(self, spec: str, dataset: Any, column: str, labels: np.ndarray, names: list[str] | None) -> None:
        super().__init__(labels, names)
        self._spec, self._dataset, self._column = spec, dataset, column

    def image(self, i: int) -> bytes:
        cell = self._dataset[i][self._column]
        return cell["bytes"] or Path(cell["path"]).read_bytes()

    def name(self, i: int) -> str:
        return f"{self._spec}[{i}] {self._dataset[i][self._column]['path'] or ''}".rstrip()

    def key(self, i: int) -> str:
        return f"hfds[{i}]"  # the names of data set and image may contain paths, and to read the latter loads the image


def _open_huggingface(request: Request) -> Source:
    # Not timm's reader: version 1.0.9 converts paths to lower case and fails on labels without class names.
    datasets = request.require("datasets", "datasets")
    name = request.spec.split("/", 1)[1]
    try:
        dataset = datasets.load_dataset(name, split=request.split_name, cache_dir=request.root or None)
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"cannot open split {request.split_name} of {request.spec} ({error}).") from error
    columns = dataset.features
    image = _column(columns, "image", datasets.Image)
    label = _column(columns, "label", datasets.ClassLabel)
    if image is None or label is None:
        raise UserError(f"expected an image and a label column in {request.spec}, found {some(list(columns))}.")
    labels = np.asarray(dataset[label][:])
    if not len(labels) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise UserError(f"expected labels from 0 on in {request.spec}, found {some(np.unique(labels))}.")
    names = list(columns[label].names) if isinstance(columns[label], datasets.ClassLabel) else None
    return _HuggingFace(request.spec, dataset.cast_column(image, datasets.Image(decode=False)), image, labels, names)


def _column(columns: dict[str, Any], name: str, kind: type) -> str | None:
    """Return `name` if there is such a column, else the first column of that kind."""
    return name if name in columns else next((key for key, value in columns.items() if isinstance(value, kind)), None)


def _open_stream(request: Request) -> Source | StreamSource:
    kind, name = request.spec.split("/", 1)
    remote = kind == "wds" and name.startswith(_REMOTE)
    # Absolute, because WebDataset runs "pipe:…" as a command.
    place = os.path.abspath(os.path.expanduser(name)) if kind == "wds" and not remote else request.root or None
    if remote:
        place = name
    elif kind == "wds" and (shards := open_shards(Path(place), request)) is not None:
        return shards
    request.require(*_STREAM_PACKAGES[kind])
    make_reader = partial(_make_reader, kind, name=name, root=place, split=request.split_name)
    try:
        reader = make_reader()
    except (AssertionError, AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"cannot open split {request.split_name} of {request.spec} ({error}). A wds/ folder needs _info.json, or a "
            "split with file names and the number of samples, such as 'part-{000..099}.tar|50000'."
        ) from error
    if kind == "wds":
        if not isinstance(reader.info, dict) or not isinstance(reader.info.get("num_classes"), int):
            raise UserError(f'expected the number of classes as "num_classes" in {place}/_info.json, found none.')
        shards = len(reader.split_info.filenames)
        return StreamSource(request.spec, make_reader, reader.num_samples, shards, None, reader.info["num_classes"])
    names = getattr((reader.builder.info.features or {}).get("label"), "names", None)
    if not names:
        raise UserError(f"expected a feature 'label' with class names in {request.spec}, found none.")
    shards = reader.builder.as_streaming_dataset(split=request.split_name).num_shards if kind == "hfids" else None
    return StreamSource(request.spec, make_reader, reader.num_samples, shards, list(names), len(names))


def _make_reader(kind: str, **options: Any) -> Any:
    # Not timm's create_reader: version 1.0.9 converts names, and so paths, to lower case.
    reader_class = getattr(importlib.import_module(f"timm.data.readers.reader_{kind}"), f"Reader{kind.capitalize()}")
    reader = reader_class(**options)
    if kind == "wds":
        reader._lazy_init = partial(_stop_at_lost_shards, reader_class, reader)
    return reader


def _stop_at_lost_shards(reader_class: type, reader: Any) -> None:
    """Initialise timm's reader so that it stops at an unreadable shard. By default it would read other shards a second time."""
    from webdataset import reraise_exception
    from webdataset.tariterators import tarfile_samples

    reader_class._lazy_init(reader)
    for stage in reader.ds.pipeline:
        if getattr(stage, "f", None) is tarfile_samples:
            stage.kw["handler"] = reraise_exception


_OPENERS: dict[str, Callable[[Request], Source | StreamSource]] = {
    "digits": _open_digits,
    "torch": _open_torchvision,
    "hfds": _open_huggingface,
    "hfids": _open_stream,
    "tfds": _open_stream,
    "wds": _open_stream,
}


def _opener(request: Request) -> Callable[[Request], Source | StreamSource]:
    kind, _, name = request.spec.partition("/")
    if not request.spec.strip():
        raise UserError("expected a folder or the name of a data set, got nothing (an unset shell variable?).")
    if kind == "digits" or kind not in _OPENERS:
        return _OPENERS.get(request.spec, open_path)
    if not name:
        raise UserError(f"expected a name after {kind}/, got {request.spec!r}; a folder of that name is ./{kind}.")
    return _OPENERS[kind]
