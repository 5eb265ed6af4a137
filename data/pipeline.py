"""Processing of encoded images in loader workers: the two pipelines of `data.pipeline`, and evaluation's.

A pipeline turns (encoded image, key of its random draws) into pixels and what remains to be done on the training device:

- `timm`: decoding by Pillow, the rest by timm and torchvision, one image at a time → float32 in [0, 1], nothing remains;
- `fast`: decoding, RandomResizedCrop → uint8, and `data.augment.Draws` for the rest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, PILToTensor

from data.augment import Draws, draw, draw_crop, generator
from data.decoding import CropDecoder, decode
from data.transforms import HEAVY, NONE, ImageTransform, eval_geometry, seeded, train_transform

TIMM, FAST = PIPELINES = ("timm", "fast")

RandomKey = tuple[int | str, ...]
Pipeline = Callable[[bytes | Image.Image, RandomKey], tuple[Tensor, Draws | None]]


class TransformError(RuntimeError):
    """A transform failed on an image that could be decoded: a defect."""


class PillowPipeline:
    """A transform of RGB images whose random draws come from the global generators."""

    def __init__(self, transform: ImageTransform, *, upright: bool = True) -> None:
        self._transform, self._upright = transform, upright

    def __call__(self, image: bytes | Image.Image, key: RandomKey) -> tuple[Tensor, None]:
        """Return (3, size, size) pixels. Raises one of `DECODE_ERRORS`, or TransformError."""
        decoded = decode(image, upright=self._upright)
        try:
            with seeded(*key):
                return self._transform(decoded), None
        except Exception as error:
            raise TransformError from error


class FastPipeline:
    """Decoding and RandomResizedCrop only; the rest is drawn here and applied on the device."""

    def __init__(self, size: int, *, heavy: bool, min_scale: float, flip: float) -> None:
        self._size, self._heavy, self._min_scale, self._flip = size, heavy, min_scale, flip
        self._decoder = CropDecoder()

    def __call__(self, image: bytes | Image.Image, key: RandomKey) -> tuple[Tensor, Draws]:
        """Return uint8 (3, size, size), and the draws of one image. Raises one of `DECODE_ERRORS`."""
        rng = generator(*key)
        x = self._decoder(
            image, lambda height, width: draw_crop(rng, height, width, min_scale=self._min_scale), self._size
        )
        return x, draw(rng, self._size, flip=self._flip, heavy=self._heavy)


def train_pipeline(
    name: str, augmentation: int, size: int, *, min_scale: float, flip: float, crop_pct: float
) -> Pipeline:
    """Return the pipeline `name`, "timm" or "fast"; other arguments as in `train_transform`."""
    if name not in PIPELINES:
        raise ValueError(f"pipeline: expected one of {', '.join(PIPELINES)}, got {name!r}")
    if name == TIMM:
        return PillowPipeline(train_transform(augmentation, size, min_scale=min_scale, flip=flip, crop_pct=crop_pct))
    if augmentation == NONE:
        return PillowPipeline(Compose([*eval_geometry(size, crop_pct), PILToTensor()]))
    return FastPipeline(size, heavy=augmentation == HEAVY, min_scale=min_scale, flip=flip)


def to_unit(x: Tensor, dtype: torch.dtype, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
    """Convert uint8 levels, or pixels that are in [0, 1] already, to floating-point numbers in [0, 1]."""
    found = x.to(dtype, memory_format=memory_format)  # one copy, also to another memory format
    return found.div_(255) if x.dtype == torch.uint8 else found
