"""Base classes of image sources, with random access or as a stream, and the arguments of `open_source`."""

from __future__ import annotations

import hashlib
import importlib
import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from common.errors import UserError
from data.decoding import DECODE_ERRORS, decode

SAMPLED = 16  # images that identify a data set


class Source:
    """Images with random access. A subclass defines how to get image i; all labels are known from the start.

    `labels` is int64 (N,). `class_names` is None if the data set only numbers its classes; `num_classes` is then the
    largest label + 1. `classes` are the sorted numbers of its classes; without names, of those that occur.
    `of_folders`: its classes are folders, numbered by their sorted names.
    """

    of_folders = False

    def __init__(self, labels: Sequence[int] | np.ndarray, class_names: list[str] | None) -> None:
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = class_names
        self.classes = np.unique(self.labels).tolist() if class_names is None else list(range(len(class_names)))
        self.num_classes = self.classes[-1] + 1

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> tuple[bytes | Image.Image, int]:
        """Return image i, as its file's bytes if there are any, and its label in [0, num_classes)."""
        return self.image(i), int(self.labels[i])

    def image(self, i: int) -> bytes | Image.Image:
        raise NotImplementedError

    def name(self, i: int) -> str:
        """Return image i's path, or another text by which a person can identify it."""
        raise NotImplementedError

    def key(self, i: int) -> str:
        """Return image i's name without the location of the data set on this machine."""
        return self.name(i)

    def size(self, i: int) -> int:
        """Return the size of image i in memory in bytes."""
        return len(encoded(self, i))

    def relabel(self, numbers: Sequence[int], class_names: list[str]) -> None:
        """Renumber class c to `numbers[c]`, its index in `class_names`."""
        self.labels = np.asarray(numbers, dtype=np.int64)[self.labels]
        self.class_names, self.num_classes, self.classes = class_names, len(class_names), sorted(set(numbers))


class StreamSource:
    """Samples that can only be read in order, through a reader of timm (`wds/`, `tfds/`, `hfids/`).

    `shards` is the number of files to distribute to ranks and workers, or None if any number of them can share. These
    readers decode images themselves: wds/ warns about broken images and skips them, the others stop. `classes` as in `Source`.
    """

    of_folders = False

    def __init__(
        self,
        spec: str,
        make_reader: Callable[..., Any],
        length: int,
        shards: int | None,
        class_names: list[str] | None,
        num_classes: int,
    ) -> None:
        self.spec, self._make_reader, self._length, self.shards = spec, make_reader, length, shards
        self.class_names, self.num_classes = class_names, num_classes
        self._numbers: Sequence[int] = range(num_classes)
        self.classes = list(self._numbers)

    def __len__(self) -> int:
        return self._length

    def relabel(self, numbers: Sequence[int], class_names: list[str]) -> None:
        """Renumber class c to `numbers[c]`, its index in `class_names`."""
        self._numbers, self.classes = numbers, sorted(set(numbers))
        self.class_names, self.num_classes = class_names, len(class_names)

    def samples(
        self, *, training: bool, batch_size: int, seed: int, rank: int, world_size: int, num_workers: int
    ) -> Iterator[tuple[Image.Image, int]]:
        """Yield this loader worker's (RGB image, label): shuffled and wrapping around if `training`, else each once.

        Raises:
            UserError: a file cannot be read, or a label is not below the number of classes.
        """
        reader = self._make_reader(is_training=training, batch_size=batch_size, seed=seed)
        # timm would take these from torch.distributed if it is initialised; here they are arguments.
        reader.dist_rank, reader.dist_num_replicas = rank, world_size
        reader.set_loader_cfg(num_workers=max(num_workers, 1))
        try:
            for position, (image, label) in enumerate(reader):
                if not 0 <= label < len(self._numbers):
                    raise UserError(
                        f"{self.spec}: expected labels below {len(self._numbers)}, found {label} at position {position}."
                    )
                yield image, self._numbers[label]
        except (OSError, tarfile.TarError) as error:
            reason = ": ".join(
                text for text in error.args if isinstance(text, str)
            )  # WebDataset adds the shard's address
            raise UserError(f"{self.spec}: cannot be read ({reason}).") from error


class Collected(Source):
    """The first `count` samples of a stream, read once and kept in memory, losslessly encoded."""

    def __init__(self, stream: StreamSource, count: int) -> None:
        reader = {"training": False, "batch_size": 1, "seed": 0, "rank": 0, "world_size": 1, "num_workers": 1}
        samples = list(islice(stream.samples(**reader), count))
        if not samples:
            raise UserError(f"{stream.spec}: expected at least one image, found none.")
        if len(samples) < (expected := min(count, len(stream))):
            raise UserError(f"{stream.spec}: expected {expected} images, got {len(samples)}.")
        super().__init__([label for _, label in samples], stream.class_names)
        self.num_classes, self.classes, self._spec = stream.num_classes, stream.classes, stream.spec
        self._images = [_png(image) for image, _ in samples]

    def image(self, i: int) -> bytes:
        return self._images[i]

    def name(self, i: int) -> str:
        return f"{self._spec}[{i}]"

    def key(self, i: int) -> str:
        return f"{self._spec.split('/')[0]}[{i}]"  # the rest may be a folder


@dataclass(frozen=True)
class Request:
    """Arguments of `open_source`; `split_name` is the split's name in data sets with named splits."""

    spec: str
    split: str
    root: str
    split_name: str

    def require(self, module: str, package: str) -> ModuleType:
        try:
            return importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"{self.spec} needs a package: pip install {package} ({error}).") from error


def facts_of(source: Source | StreamSource) -> dict[str, Any]:
    """Return facts that identify a data set independently of its location.

    `images`, their number; `classes`, their names, None if they have none; `sample`, a digest of up to 16 images and their
    labels, None if they are only read in order or cannot be read.
    """
    facts: dict[str, Any] = {"images": len(source), "classes": source.class_names, "sample": None}
    if isinstance(source, Source):
        digest, count = hashlib.sha256(), min(SAMPLED, len(source))
        try:
            for index in (i * len(source) // count for i in range(count)):
                digest.update(_content(source.image(index)) + f" {source.labels[index]} ".encode())
        except (*DECODE_ERRORS, UserError):  # left to training, which may or may not use that image
            return facts
        facts["sample"] = digest.hexdigest()[:16]
    return facts


def _content(image: bytes | Image.Image) -> bytes:
    """Return what is the same on every machine: decoders of lossy files differ in the last bit."""
    if isinstance(image, bytes):
        return image
    return repr((image.size, image.mode)).encode() + (image.tobytes() if image.format in (None, "PNG") else b"")


def encoded(source: Source, i: int) -> bytes:
    image = source.image(i)
    return image if isinstance(image, bytes) else _png(image)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    decode(image).save(file, "PNG")  # lossless
    return file.getvalue()


def some(things: Sequence[Any] | np.ndarray) -> str:
    shown = ", ".join(str(thing) for thing in things[:8])
    return shown + (f", … ({len(things)})" if len(things) > 8 else "") if len(things) else "nothing"
