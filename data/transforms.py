"""Transforms of an RGB image to a float32 tensor (3, size, size) in [0, 1], not normalised: heavy, basic, evaluation; mixup.

Random draws come from the global generators of Python, numpy and PyTorch, as timm's and torchvision's do;
`seeded` makes them a function of a key.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import timm.data
import torch
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.auto_augment import RandAugment, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Resize,
    ToTensor,
)

from common.errors import UserError
from common.seeding import derive_seed

BASIC, HEAVY, NONE = range(3)  # values of data.augmentations

ImageTransform = Callable[[Image.Image], Tensor]


@contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Seed Python's, numpy's and PyTorch's CPU generator from `key`; restores their states afterwards."""
    seed = derive_seed(*key)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPUs
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


INTERPOLATIONS = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}


def eval_geometry(
    size: int, crop_pct: float, interpolation: str = "bicubic", crop_mode: str = "center"
) -> list[Callable[[Image.Image], Image.Image]]:
    """Return transforms that resize the shorter side to ⌊size / crop_pct⌋ pixels (Pillow's, antialiased) and crop the centre.

    `crop_mode`: "squash" resizes both sides to `size` instead, "crop" does not resize.
    """
    if crop_mode == "squash":
        return [Resize((size, size), INTERPOLATIONS[interpolation])]
    if crop_mode == "crop":
        return [CenterCrop(size)]
    return [Resize(math.floor(size / crop_pct), INTERPOLATIONS[interpolation]), CenterCrop(size)]


def eval_transform(
    size: int, crop_pct: float = 0.875, interpolation: str = "bicubic", crop_mode: str = "center"
) -> ImageTransform:
    """Return the transforms of `eval_geometry` and a conversion to a tensor."""
    return Compose([*eval_geometry(size, crop_pct, interpolation, crop_mode), ToTensor()])


def train_transform(
    augmentation: int, size: int, *, min_scale: float = 0.08, flip: float = 0.5, crop_pct: float = 0.875
) -> ImageTransform:
    """Return the training transform ("basic" and "heavy" of the paper's section 3; for mixup see `Mixup`).

    Args:
        augmentation: 0 basic: random resized crop and flip; 1 heavy: these, RandAugment and random erasing;
            2 none: as for evaluation.
        size: side of the result in pixels.
        min_scale: smallest share of the image's area that the crop covers.
        flip: probability of a horizontal flip.
        crop_pct: as in `eval_transform`, for augmentation 2.
    """
    if augmentation == NONE:
        return eval_transform(size, crop_pct)
    # torchvision's crop, not timm's: the latter fails on images of one or two pixels.
    crop_and_flip = [
        RandomResizedCrop(size, (min_scale, 1.0), interpolation=InterpolationMode.BICUBIC),
        RandomHorizontalFlip(flip),
    ]
    if augmentation == BASIC:
        return Compose([*crop_and_flip, ToTensor()])
    if augmentation == HEAVY:
        return Compose([*crop_and_flip, _rand_augment(), ToTensor(), NoiseErasing(probability=0.25)])
    raise ValueError(f"augmentation: expected 0 (basic), 1 (heavy) or 2 (none), got {augmentation!r}")


def _rand_augment() -> RandAugment:
    augment = rand_augment_transform(
        "rand-m9-mstd0.5-inc1", {"img_mean": (0, 0, 0), "interpolation": Image.Resampling.BICUBIC}
    )
    for op in augment.ops:
        if op.name.startswith("Posterize"):
            op.aug_fn = _posterize
    return augment


def _posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    # The strongest magnitude keeps 0 bits: black. Pillow did so until version 13, which raises instead.
    return ImageOps.posterize(image, bits_to_keep) if bits_to_keep else Image.new(image.mode, image.size)


class NoiseErasing:
    """Random erasing (Zhong et al. 2020) for images in [0, 1]: a rectangle, drawn by timm, is replaced by noise.

    Each of its pixels is N(ImageNet mean, std) clamped to [0, 1], which corresponds to N(0, 1) in normalised images.
    """

    def __init__(self, *, probability: float) -> None:
        self._erase = RandomErasing(probability, mode="pixel", device="cpu")
        self._mean = torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1)
        self._std = torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1)

    def __call__(self, x: Tensor) -> Tensor:
        """Return (3, H, W) `x`, in some cases with a rectangle of noise; `x` itself is unchanged."""
        noise = self._erase(torch.full_like(x, math.nan))  # numbers where timm erases, NaN elsewhere
        return torch.where(noise.isnan(), x, (noise * self._std + self._mean).clamp(0, 1))


class Mixup:
    """mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019), drawn for each batch, with label smoothing."""

    def __init__(
        self,
        *,
        num_classes: int,
        label_smoothing: float,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        switch_prob: float = 0.5,
        prob: float = 1.0,
    ) -> None:
        """Set up; `mixup`, `cutmix`: of their Beta distributions; `switch_prob`: share of CutMix; `prob`: of mixed batches."""
        self._mix = timm.data.Mixup(
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            prob=prob,
            switch_prob=switch_prob,
            mode="batch",
            label_smoothing=label_smoothing,
            num_classes=num_classes,
        )

    def __call__(self, x: Tensor, y: Tensor, *, seed: int, step: int, block: int) -> tuple[Tensor, Tensor]:
        """Mix each image with its mirror in the batch: image i with image B − 1 − i.

        Args:
            x: (B, 3, H, W), B even; not changed, the result is a new tensor.
            y: int64 (B,).
            seed, step, block: all that the draws depend on; `block` numbers the micro-batches of a step over all processes.

        Returns:
            mixed x, and float32 soft labels (B, num_classes) whose rows sum to 1.

        Raises:
            UserError: B is odd.
        """
        if len(x) % 2:
            raise UserError(f"expected an even number of images, because mixup pairs them; got {len(x)}.")
        with seeded("mixup", seed, step, block):
            return self._mix(x.clone(), y)  # timm mixes in place
