"""ImageNet's classes, and RobustBench's 5,000 validation images, which are read from its package without importing it."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError

CLASSES = 1000
# A folder with at least this many of the classes is ImageNet, perhaps incomplete.
_MOST = 900


@dataclass(frozen=True)
class ImageIds:
    """`keys`: `<class>/<file>` below the validation folder, in RobustBench's order; `class_names`: all 1,000, by number."""

    keys: list[str]
    class_names: list[str]


def robustbench_ids() -> ImageIds:
    """Return the list of the installed robustbench.

    Raises:
        UserError: robustbench is not installed, or has no such list.
    """
    spec = importlib.util.find_spec("robustbench")  # does not run it, because it imports packages that may be missing
    if spec is None or spec.origin is None:
        raise UserError(
            "the list of 5,000 images is part of robustbench, which is not installed: pip install robustbench."
        )
    folder = Path(spec.origin).parent / "helper_files"
    try:
        keys = (folder / "imagenet_test_image_ids.txt").read_text().split()
        numbers = json.loads((folder / "imagenet_class_to_id_map.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"the installed robustbench has no readable list of images in {folder} ({error}).") from error
    return ImageIds(keys=keys, class_names=sorted(numbers, key=numbers.__getitem__))


def imagenet_classes() -> list[str]:
    """Return the 1,000 classes (WordNet IDs, n01440764 …) in the order of networks' outputs, which is alphabetical."""
    from timm.data import ImageNetInfo  # slow to import

    return ImageNetInfo().label_names()


def looks_like_imagenet(class_folders: list[str]) -> bool:
    """Return whether 900 to 1,000 of these folders are named like ImageNet's classes (n01440764)."""
    matches = sum(re.fullmatch(r"n\d{8}", name) is not None for name in class_folders)
    return _MOST <= matches <= CLASSES
