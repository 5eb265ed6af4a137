"""The images of an evaluation: selection, order, labels, and pixels of each chunk."""

from __future__ import annotations

import hashlib
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError, blame
from common.seeding import derive_seed
from data.datasets import match_classes, open_source
from data.decoding import DECODE_ERRORS, decode
from data.folders import LooseImages, class_folders, open_labelled, open_listed
from data.imagenet_ids import CLASSES, imagenet_classes, looks_like_imagenet, robustbench_ids
from data.labels import Classes, classes_by_index, classes_by_map, in_natural_order, named_by_numbers
from data.loader import EvalLoader, print_warning, spread_indices
from data.source import Collected, Source, StreamSource, some
from evaluation.config import EvalDataConfig
from zoo.description import Preprocessing

PROBED = 8  # images whose pixels distinguish data sets with the same file names


@dataclass(frozen=True)
class Chunk:
    """Images of one chunk, on the CPU.

    `x` (B, 3, size, size): float32 in [0, 1]; `y` int64 (B,); `positions` int64 (B,): indices in the evaluation's list of images;
    `unreadable`: "name (reason)" of images that are omitted because they cannot be decoded.
    """

    x: Tensor
    y: Tensor
    positions: Tensor
    unreadable: list[str]


class ImageList:
    """The images of an evaluation by position; pixels are read on demand."""

    def __init__(self, source: Source, indices: list[int], num_workers: int = 0, *, robustbench: bool = False) -> None:
        """Create a list whose position p is image `indices[p]` of `source`; `num_workers` processes decode, 0: this process.

        `robustbench`: the images are the first ones of RobustBench's list. As for the published numbers, their EXIF orientation is
        then ignored.
        """
        self.source, self.indices, self._num_workers, self.robustbench = source, indices, num_workers, robustbench

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> list[int]:
        return self.source.labels[self.indices].tolist()

    @property
    def classes(self) -> tuple[int, ...]:
        """Class numbers of the data set; for folders, those of the non-empty ones."""
        if self.robustbench or not self.source.of_folders:
            return tuple(self.source.classes)
        return tuple(np.unique(self.source.labels).tolist())

    @cached_property
    def keys(self) -> list[str]:
        """Names of the images, independent of the location of the data set."""
        return [self.source.key(i) for i in self.indices]

    def digest(self) -> str:
        """Return the SHA-256 of names and labels, in order."""
        lines = "".join(f"{key}\t{label}\n" for key, label in zip(self.keys, self.labels))
        return hashlib.sha256(os.fsencode(lines)).hexdigest()  # file names need not be UTF-8

    def probe(self, used: Preprocessing) -> str:
        """Return the SHA-256 of the pixels of a few images; data sets such as ImageNet-C differ in pixels only."""
        chunk = self.read(spread_indices(len(self), PROBED), used)
        return hashlib.sha256(chunk.x.mul(255).round().to(torch.uint8).numpy().tobytes()).hexdigest()

    @cached_property
    def common_size(self) -> str | None:
        """Size that a few images share (square, or shorter side), else None. Resized copies share one, original photos do not."""
        sizes = set()
        for p in spread_indices(len(self), PROBED):
            with suppress(*DECODE_ERRORS):
                sizes.add(decode(self.source.read(self.indices[p])[0], upright=not self.robustbench).size)
        shorter = {min(size) for size in sizes}
        if len(shorter) != 1:
            return None
        side = shorter.pop()
        return f"{side} × {side} px" if sizes == {(side, side)} else f"{side} px at the shorter side"

    def read(self, positions: list[int], used: Preprocessing) -> Chunk:
        """Decode the images at these positions and apply the evaluation transform (resize, centre crop)."""
        workers = min(self._num_workers, len(positions))
        loader = EvalLoader(
            self.source,
            size=used.img_size,
            crop_pct=used.crop_pct,
            interpolation=used.interpolation,
            crop_mode=used.crop_mode,
            batch_size=math.ceil(len(positions) / max(workers, 1)),  # a worker decodes whole batches: one batch each
            num_workers=workers,
            upright=not self.robustbench,
        )
        x, y, index, failures, _ = zip(*loader.batches([self.indices[p] for p in positions]))
        place = {self.indices[p]: p for p in positions}
        shown = torch.tensor([place[i] for i in torch.cat(index).tolist()], dtype=torch.int64)
        for p in set(positions) - set(shown.tolist()):
            _check_it_can_be_read(self.source, self.indices[p])
        unreadable = [f"{name} ({reason})" for some in failures for name, reason in some]
        return Chunk(torch.cat(x), torch.cat(y), shown, unreadable)


def _check_it_can_be_read(source: Source, i: int) -> None:
    """Raise RuntimeError if the file cannot be read from disk, because a missing data set must not count as undecodable images."""
    try:
        source.read(i)
    except OSError as error:
        if error.errno is not None:  # Pillow's own errors have none
            raise RuntimeError(f"{source.name(i)} cannot be read ({error.strerror}).") from error
    except DECODE_ERRORS:
        pass


def open_images(
    data: EvalDataConfig, *, ids: str, n_ex: int, num_classes: int, class_names: list[str] | None
) -> ImageList:
    """Open the first `n_ex` images of `data.val_dataset`, labelled with the network's classes.

    The order is that of RobustBench's list if it is used, else that of the data set. A data set sorted by class (folders, tars)
    is shuffled with a fixed seed. Streams keep their order, because only the needed part of them is read. In every case, a
    smaller `n_ex` selects a prefix of a larger one.

    `data.classes`, `data.class_map` or `data.labels` determine the labels if given. Otherwise labels are matched by class name if
    the run recorded its classes, or if a network with 1,000 classes gets (some of) ImageNet's. In all other cases the data set
    must have as many classes as the head: folders are numbered by sorted names, and a missing one would shift all later numbers.

    Args:
        data: location and labels of the images.
        ids: "robustbench": the 5,000 of its list; "all": those of the data set; "auto": the list if the data set is ImageNet.
        n_ex: number of images; 0: all.
        num_classes: number of outputs of the network.
        class_names: names of the network's outputs, if known.

    Raises:
        UserError: the data set does not exist, images or classes are missing, or its classes are not the network's.
    """
    imagenet = imagenet_classes() if num_classes == CLASSES else None
    if imagenet and class_names and _only_words(data, class_names, imagenet):
        print_warning(
            f"the network's class names are words ({some(class_names)}), the folders are ImageNet's; its outputs are assumed to be "
            "in ImageNet's order. If they are not, give data.class_map."
        )
        class_names = None
    listed = _listed(data, "all" if data.own_classes else ids, class_names)
    words = imagenet if imagenet and class_names and not set(class_names) & set(imagenet) else ()
    source = listed or _whole(data, n_ex, Classes(num_classes, class_names or imagenet, words), class_names)
    found = source.num_classes
    if found > num_classes or (source.class_names is not None and found != num_classes):
        others = set(source.class_names or ()) - set(imagenet or ())
        hint = (
            f"; not in ImageNet: {some(sorted(others))}"
            if imagenet and class_names is None and 0 < len(others) < found
            else ""
        )
        raise UserError(
            f"model.num_classes: the head has {num_classes} classes, data.val_dataset has {found}. Class folders are numbered by "
            f"their sorted names, so every class needs a folder (it may be empty); or give data.class_map{hint}."
        )
    order = np.arange(len(source))
    if not isinstance(source, Collected) and sorted_by_class(source):
        bits = np.random.MT19937(derive_seed("evaluation order", len(source)))
        order = np.random.RandomState(bits).permutation(len(source))  # numpy guarantees the results of RandomState
    return ImageList(source, order[: n_ex or len(order)].tolist(), data.num_workers, robustbench=listed is not None)


def _only_words(data: EvalDataConfig, class_names: list[str], imagenet: list[str]) -> bool:
    """Return whether the folders are ImageNet's classes and none of the network's names is one."""
    folders = set(class_folders(data.val_dataset))
    return bool(folders) and folders <= set(imagenet) and not set(class_names) & set(imagenet)


def sorted_by_class(source: Source) -> bool:
    """Return whether the images are grouped by class, so that the first ones would have the same class."""
    return np.count_nonzero(np.diff(source.labels)) == len(np.unique(source.labels)) - 1


def _listed(data: EvalDataConfig, ids: str, class_names: list[str] | None) -> Source | None:
    if ids == "all":
        return None
    if ids == "auto" and not looks_like_imagenet(class_folders(data.val_dataset)):
        return None
    with blame("eval.ids"):
        listed = robustbench_ids()
    try:
        source = open_listed(data.val_dataset, listed.keys, listed.class_names)
        if class_names is not None:
            match_classes(source, class_names, data.val_dataset)
    except UserError as error:
        more = " Give --eval.ids=all to use the folder's own images." if ids == "auto" else ""
        raise UserError(f"data.val_dataset: {error}{more}") from error
    return source


def _whole(data: EvalDataConfig, n_ex: int, classes: Classes, class_names: list[str] | None) -> Source:
    """Open all images; `class_names`: recorded by the run."""
    if data.labels:
        with blame("data.labels"):
            return open_labelled(data.val_dataset, Path(data.labels), classes)
    with blame("data.val_dataset"):
        try:
            source = open_source(data.val_dataset, split="val", root=data.root, split_name=data.val_split)
        except LooseImages as error:
            raise UserError(f"{error} Or give --data.labels=FILE with the class of each image.") from error
        names = source.class_names
        if data.own_classes and names is None:
            raise UserError(
                f"expected class folders for {data.own_classes[0]}, but {data.val_dataset} has no class names."
            )
        by_name = not data.own_classes and names is not None
        if by_name and not classes.know(names) and named_by_numbers(source, classes.count):
            raise UserError(
                f"expected class folders named as the network's classes, found {len(names)} numbers ({some(names)}). Sorted as "
                "names, their order need not be that of the classes. Give --data.classes=index if folder k is class k, or "
                "--data.class_map=FILE with the class of each folder."
            )
    if data.class_map:
        with blame("data.class_map"):
            source.relabel(classes_by_map(names, Path(data.class_map), classes), classes.names)
    # Numbers recorded by the run are names: in training, the classes were numbered by the order of these names.
    elif data.classes == "index" and (class_names is None or not classes.know(names)):
        with blame("data.classes"):
            source.relabel(classes_by_index(names, classes), classes.names)
    elif class_names is not None or (names is not None and classes.know(names)):
        try:
            match_classes(source, classes.names, data.val_dataset)
        except UserError as error:
            raise UserError(
                f"data.val_dataset: {error} Or give --data.class_map=FILE with the class of each folder."
            ) from error
    elif names is not None and source.of_folders and (classes.count == CLASSES or names != in_natural_order(names)):
        print_warning(
            f"the names of the network's classes are unknown, so the class folders are numbered by their sorted names "
            f"({some(names)}). If the network has another order, give data.class_map."
        )
    if isinstance(source, StreamSource):
        return Collected(source, n_ex or len(source))
    return source
