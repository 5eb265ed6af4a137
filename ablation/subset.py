"""Export of a part of a data set as class folders, for short runs.

    python -m ablation.subset torch/CIFAR10 images/cifar10/train --root images --split train --per-class 1000
    python -m ablation.subset torch/CIFAR10 images/cifar10/val --root images --split train --per-class 100 --skip 4500
    python -m ablation.subset torch/CIFAR10 images/cifar10/test --root images --split test  --per-class 100

SOURCE is any data set that `data.train_dataset` accepts, except streams. The order of each class's images is shuffled with a
fixed seed, and images `skip` to `skip + per_class` are written: the bytes of the source's files, or PNG where there are none.
Parts of one split with disjoint ranges do not overlap. A larger `--per-class` includes the images of a smaller one.
The output folder must not exist.

Exit status: 0; 2 wrong input.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import UserError, blame
from common.files import writable
from common.seeding import derive_seed
from data.datasets import Source, StreamSource, open_source

SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "GIF": ".gif", "TIFF": ".tif"}


def main(argv: Sequence[str]) -> int:
    """Run one command line (without the program's name) and return the exit status."""
    arguments = parser().parse_args(argv)
    try:
        count = write_subset(**vars(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{count} images in {arguments.out}")
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m ablation.subset", description="Export a part of a data set as class folders."
    )
    made.add_argument("source", help="data set, as for data.train_dataset")
    made.add_argument("out", type=Path, help="output folder; must not exist")
    made.add_argument("--split", default="train", help="name of the split (default train)")
    made.add_argument("--root", default="", help="folder of the data set's files (data.root)")
    made.add_argument("--per-class", type=int, required=True, help="images per class")
    made.add_argument("--skip", type=int, default=0, help="images to skip at the start of each class")
    return made


def write_subset(source: str, out: Path, *, split: str, root: str, per_class: int, skip: int) -> int:
    """Write the folder `out`, completely or not at all, and return the number of images.

    Raises:
        UserError: unknown data set, or one that can only be read in order; a class with too few images; `out` exists.
    """
    if per_class < 1 or skip < 0:
        raise UserError(f"--per-class, --skip: expected at least 1 and at least 0, got {per_class} and {skip}.")
    if out.exists():
        raise UserError(f"{out} exists already; expected the path of a new folder.")
    with blame("source"):
        opened = open_source(source, split="train" if split == "train" else "val", root=root, split_name=split)
    if isinstance(opened, StreamSource):
        raise UserError(
            f"source: {source} can only be read in order; expected a folder, .tar, torch/ or hfds/ data set."
        )
    partial = out.with_name(f".{out.name}.part")
    with writable("out", out):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            count = sum(
                _write_class(opened, c, partial, slice(skip, skip + per_class)) for c in range(opened.num_classes)
            )
            os.rename(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return count


def _write_class(source: Source, number: int, folder: Path, part: slice) -> int:
    """Write the images of one class into a folder with the class's name; return their number."""
    width = len(str(source.num_classes - 1))
    name = source.class_names[number] if source.class_names else f"{number:0{width}d}"
    of_class = np.flatnonzero(source.labels == number)
    bits = np.random.MT19937(derive_seed("subset", number, len(of_class)))
    chosen = np.random.RandomState(bits).permutation(of_class)[part]  # numpy keeps RandomState's results stable
    if len(chosen) < part.stop - part.start:
        raise UserError(
            f"class {name} has {len(of_class)} images; expected at least {part.stop} (--skip and --per-class)."
        )
    (target := folder / name.replace("/", "-")).mkdir(parents=True)
    for i in chosen.tolist():
        image = source.image(i)
        if isinstance(image, bytes):
            suffix = SUFFIXES.get(Image.open(io.BytesIO(image)).format or "", ".img")
            (target / f"{i:07d}{suffix}").write_bytes(image)
        else:
            image.save(target / f"{i:07d}.png")
    return len(chosen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
