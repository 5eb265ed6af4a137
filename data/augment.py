"""Augmentation of whole batches on the training device, with separate operations and magnitudes for each sample.

The distribution is timm's "rand-m9-mstd0.5-inc1": RandAugment (Cubuk et al. 2020) with two of 15 operations, each applied with
probability 0.5 and magnitude N(9, 0.5), in the variants that grow with the magnitude, bicubic, with black fill. It follows a
horizontal flip and precedes random erasing. Loader workers draw (`draw`) as a function of a seed and pass the draws on with the
images. `augment` applies them on uint8, like Pillow, with the same code on CPU and GPU, and reads nothing back from the device.

Eight of the 15 operations are look-up tables, one per sample and channel. A GPU processes all samples of a kind in one call.
torchvision's and kornia's operations take one magnitude per call, or interpolate differently from Pillow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.nn.functional import grid_sample

from common.seeding import derive_seed
from data.decoding import Box

LAYERS, PROBABILITY = 2, 0.5
MAGNITUDE, MAGNITUDE_STD, MAGNITUDE_MAX = 9.0, 0.5, 10.0
ERASING = 0.25  # probability
_ASPECT = (3 / 4, 4 / 3)
_LOG_ASPECT = (math.log(_ASPECT[0]), math.log(_ASPECT[1]))
_ERASED_AREA, _ERASED_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)

Generator = np.random.RandomState  # its results are the same in all versions of numpy


def generator(*key: int | str) -> Generator:
    """Return a random number generator that is a function of `key`."""
    return Generator(np.random.PCG64(derive_seed(*key)))  # a Mersenne twister takes five times as long to set up


class Draws(NamedTuple):
    """Random decisions for each of B images; on the CPU.

    `flip` bool (B,); `op` int64 (B, 2), indices in `OPERATIONS`, −1 for none; `arg` float32 (B, 2), their arguments; `box` int64
    (B, 4), top, left, height and width of the erased rectangle, all 0 for none; `noise` uint8 (n,), the pixels of all erased
    rectangles, each (3, height, width), one after the other.
    """

    flip: Tensor
    op: Tensor
    arg: Tensor
    box: Tensor
    noise: Tensor


# --- drawing ----------------------------------------------------------------------------------------------------------


def draw_crop(rng: Generator, height: int, width: int, *, min_scale: float) -> Box:
    """Draw the crop of RandomResizedCrop (Szegedy et al. 2015), as timm and torchvision do.

    Its area is at least `min_scale` of the image's, its aspect ratio 3/4 to 4/3. After ten attempts without success, the largest
    crop in the centre with such a ratio is used.
    """
    for _ in range(10):
        area = height * width * rng.uniform(min_scale, 1.0)
        aspect = math.exp(rng.uniform(*_LOG_ASPECT))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(height - h + 1), rng.randint(width - w + 1), h, w
    w, h = min(width, round(height * _ASPECT[1])), min(height, round(width / _ASPECT[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def draw(rng: Generator, size: int, *, flip: float, heavy: bool) -> Draws:
    """Draw the augmentation of one image of `size` × `size` pixels (B = 1).

    Args:
        flip: probability of the horizontal flip.
        heavy: include RandAugment and random erasing.
    """
    flipped = rng.random_sample() < flip
    op, arg, box, noise = [-1] * LAYERS, [0.0] * LAYERS, [0] * 4, np.empty(0, np.uint8)
    if heavy:
        op, arg = _operations(rng)
        box = _erased(rng, size)
        noise = _noise(rng, *box[2:])
    values = torch.tensor([flipped]), torch.tensor([op]), torch.tensor([arg]), torch.tensor([box])
    return Draws(*values, torch.from_numpy(noise))


def _operations(rng: Generator) -> tuple[list[int], list[float]]:
    """Draw indices in `OPERATIONS` (−1 for none) and arguments, layer by layer."""
    op, arg = [-1] * LAYERS, [0.0] * LAYERS
    for layer, place in enumerate(rng.randint(len(OPERATIONS), size=LAYERS).tolist()):
        if rng.random_sample() <= PROBABILITY:
            level = min(max(rng.normal(MAGNITUDE, MAGNITUDE_STD), 0.0), MAGNITUDE_MAX) / 10
            op[layer], arg[layer] = place, OPERATIONS[place].argument(level, rng)
    return op, arg


def concatenated(draws: list[Draws]) -> Draws:
    """Concatenate the draws of single images to those of a batch."""
    return Draws(*map(torch.cat, zip(*draws)))


def _erased(rng: Generator, size: int) -> list[int]:
    """Draw the rectangle of random erasing (Zhong et al. 2020), as timm does."""
    if rng.random_sample() > ERASING:
        return [0, 0, 0, 0]
    for _ in range(10):
        area = rng.uniform(*_ERASED_AREA) * size**2
        aspect = math.exp(rng.uniform(*map(math.log, _ERASED_ASPECT)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < size and width < size:
            return [rng.randint(size - height + 1), rng.randint(size - width + 1), height, width]
    return [0, 0, 0, 0]


def _noise(rng: Generator, height: int, width: int) -> np.ndarray:
    """Return (3 · height · width,) pixels of N(ImageNet mean, std), clamped to [0, 1] and rounded to 8 bits.

    A table look-up with 16 random bits is 20 times as fast as drawing from the normal distribution.
    """
    if not height * width:
        return np.empty(0, np.uint8)
    bits = np.frombuffer(rng.bytes(6 * height * width), "<u2").reshape(3, -1)
    return np.concatenate([table[some] for table, some in zip(_noise_tables(), bits)])


@cache
def _noise_tables() -> np.ndarray:
    """Return uint8 (3, 65536): the level in each channel for each value of 16 bits."""
    normal = torch.special.ndtri((torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16).numpy()
    noise = normal * np.reshape(IMAGENET_DEFAULT_STD, (3, 1)) + np.reshape(IMAGENET_DEFAULT_MEAN, (3, 1))
    return np.rint(noise.clip(0, 1) * 255).astype(np.uint8)


def _either_sign(value: float, rng: Generator) -> float:
    return -value if rng.random_sample() > 0.5 else value


def _enhancement(level: float, rng: Generator) -> float:
    return max(0.1, 1.0 + _either_sign(0.9 * level, rng))


# --- applying ---------------------------------------------------------------------------------------------------------


def augment(x: Tensor, draws: Draws) -> Tensor:
    """Apply flip, RandAugment and erasing.

    Args:
        x: uint8 (B, 3, H, W) on any device.
        draws: of these images.

    Returns:
        uint8 (B, 3, H, W), a new tensor, contiguous.
    """
    x = x.clone(memory_format=torch.contiguous_format)
    if (flipped := draws.flip.nonzero().flatten()).numel():
        rows = _on(flipped, x)
        x[rows] = x[rows].flip(-1)
    for layer in range(draws.op.shape[1]):
        _apply_layer(x, draws.op[:, layer], draws.arg[:, layer])
    noise, start = _on(draws.noise, x), 0
    for row, (top, left, height, width) in enumerate(draws.box.tolist()):
        if height:
            stop = start + 3 * height * width
            x[row, :, top : top + height, left : left + width] = noise[start:stop].view(3, height, width)
            start = stop
    return x


def _apply_layer(x: Tensor, op: Tensor, arg: Tensor) -> None:
    """Apply one operation to each sample of `x`, in place."""
    if x.device.type != "cpu":
        _apply_by_kind(x, op, arg)
    else:  # image by image, so that the data stay in the processor's cache
        for row, place in enumerate(op.tolist()):
            if place >= 0:
                operation, image = OPERATIONS[place], x[row : row + 1]
                image.copy_(operation.kind(image, operation.parameters(image, arg[row : row + 1])))


def _apply_by_kind(x: Tensor, op: Tensor, arg: Tensor) -> None:
    """Process all samples of a kind in one call, for few and large calls. Parameters are computed operation by operation."""
    order = op.argsort(stable=True)
    counts = torch.bincount(op + 1, minlength=len(OPERATIONS) + 1).tolist()
    rows, arguments = _on(order, x), _on(arg[order], x)
    start = counts[0]
    groups: dict[Callable, list[tuple[Callable, Tensor, Tensor]]] = {}
    for operation, count in zip(OPERATIONS, counts[1:]):
        if count:
            part = slice(start, start + count)
            groups.setdefault(operation.kind, []).append((operation.parameters, rows[part], arguments[part]))
            start += count
    for kind, members in groups.items():
        chosen = torch.cat([part for _, part, _ in members])
        images = x[chosen]
        split = images.split([len(part) for _, part, _ in members])
        parameters = [make(some, given) for (make, _, given), some in zip(members, split, strict=True)]
        x[chosen] = kind(images, torch.cat(parameters))


def _on(value: Tensor, x: Tensor) -> Tensor:
    """Copy `value` to the device of `x`; the host does not wait."""
    if x.device.type != "cpu" and not value.is_pinned():
        value = value.pin_memory()
    return value.to(x.device, non_blocking=True)


# Kinds: images uint8 (n, 3, H, W), parameters (n, …) → images.


def _looked_up(x: Tensor, table: Tensor) -> Tensor:
    """Map the levels of `x` by `table`, uint8 (n, 3, 256)."""
    n = len(x)
    return table.reshape(n * 3, 256).gather(1, x.view(n * 3, -1).long()).view_as(x)


def _coloured(x: Tensor, factor: Tensor) -> Tensor:
    return _blended(_grey(x).unsqueeze(1).float(), x.float(), factor)


def _sharpened(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with Pillow's SMOOTH filter: 3 × 3, the centre with weight 5; the outermost pixels are unchanged."""
    smooth = x.float()
    if min(x.shape[-2:]) > 2:
        wide = x.to(torch.int16)
        rows = wide[..., :-2, :] + wide[..., 1:-1, :] + wide[..., 2:, :]
        total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * wide[..., 1:-1, 1:-1]
        smooth[..., 1:-1, 1:-1] = (total.float() / 13 + 0.5).floor_()
    return _blended(smooth, x.float(), factor)


def _shifted_rows(x: Tensor, shift: Tensor) -> Tensor:
    """Shift each row by `shift` (n, H) pixels."""
    width = x.shape[-1]
    shift = shift[:, None, :, None]
    whole = shift.floor()
    # One gather fetches the four neighbours of each position side by side.
    place = torch.arange(-1, width + 2, device=x.device) + whole.long()
    near = x.gather(3, place.clamp_(0, width - 1).expand(-1, 3, -1, -1)).float()
    value = torch.zeros(x.shape, device=x.device)
    for k, weight in enumerate(_cubic_weights(shift - whole)):
        value.addcmul_(near[..., k : k + width], weight)
    position = torch.arange(width, device=x.device) + 0.5 + shift
    return _levels(_rounding_safe(value).mul_((position >= 0) & (position < width)))


def _shifted_columns(x: Tensor, shift: Tensor) -> Tensor:
    """Shift each column by `shift` (n, W) pixels."""
    return _shifted_rows(x.transpose(2, 3), shift).transpose(2, 3)


def _cubic_weights(d: Tensor) -> list[Tensor]:
    """Return the weights of four neighbours: cubic convolution (Keys 1981) with a = −1, as in Pillow's transforms."""
    d2, d3 = d * d, d * d * d
    return [2 * d2 - d - d3, 1 - 2 * d2 + d3, d + d2 - d3, d3 - d2]


def _rotated(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate around the centre, counter-clockwise; `angle` (n,) in radians. PyTorch's cubic convolution has a = −0.75."""
    height, width = x.shape[-2:]
    sin, cos = angle.sin().view(-1, 1, 1), angle.cos().view(-1, 1, 1)
    across = torch.arange(width, device=x.device) + 0.5 - width / 2
    down = (torch.arange(height, device=x.device) + 0.5 - height / 2).unsqueeze(-1)
    # From −1 to 1 between the outer edges of the outermost pixels.
    column, row = (cos * across - sin * down) * (2 / width), (sin * across + cos * down) * (2 / height)
    grid = torch.stack((column, row), -1)
    value = grid_sample(x.float(), grid, mode="bicubic", padding_mode="border", align_corners=False)
    return _levels(_rounding_safe(value).mul_(((column.abs() < 1) & (row.abs() < 1)).unsqueeze(1)))


def _rounding_safe(value: Tensor) -> Tensor:
    """Add a small number in place, so that weights that sum to 1 up to rounding do not turn level 255 into 254."""
    return value.add_(2**-10)


def _levels(value: Tensor) -> Tensor:
    return value.clamp_(0, 255).to(torch.uint8)  # cuts fractions off, as Pillow does


def _blended(degenerate: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Return degenerate + factor · (x − degenerate), as Pillow's ImageEnhance; `factor` (n,)."""
    return _levels(degenerate + factor.view(-1, *[1] * (x.dim() - 1)) * (x - degenerate))


def _grey(x: Tensor) -> Tensor:
    """Convert (n, 3, H, W) to (n, H, W) int32: ITU-R 601 luma in Pillow's integer arithmetic."""
    red, green, blue = x.to(torch.int32).unbind(1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


# Parameters of the look-up tables: images (n, 3, H, W), arguments (n,) → uint8 (n, 3, 256).


def _ramp(arg: Tensor) -> Tensor:
    return torch.arange(256, device=arg.device).view(1, 1, 256)


def _tables(values: Tensor, n: int) -> Tensor:
    return values.clamp(0, 255).to(torch.uint8).expand(n, 3, 256)


def _auto_contrast(x: Tensor, arg: Tensor) -> Tensor:
    low, high = x.amin((2, 3)).double().unsqueeze(-1), x.amax((2, 3)).double().unsqueeze(-1)
    scale = 255 / (high - low)
    ramp = _ramp(arg)
    return _tables(torch.where(high > low, (ramp * scale - low * scale).clamp(0, 255), ramp), len(x))


def _equalize(x: Tensor, arg: Tensor) -> Tensor:
    n = len(x)
    channel = 256 * torch.arange(n * 3, device=x.device).view(n, 3, 1, 1)
    one = torch.ones((), dtype=torch.int64, device=x.device).expand(x.numel())
    histogram = torch.zeros(n * 3 * 256, dtype=torch.int64, device=x.device)
    histogram = histogram.scatter_add_(0, (x + channel).flatten(), one).view(n, 3, 256)
    last = histogram.gather(2, x.amax((2, 3)).long().unsqueeze(-1))  # pixels of the highest level present
    step = (x.shape[2] * x.shape[3] - last).div(255, rounding_mode="floor")
    before = histogram.cumsum(2) - histogram
    table = (before + step // 2).div(step.clamp(min=1), rounding_mode="floor")
    return _tables(torch.where(step > 0, table, _ramp(arg)), n)


def _invert(x: Tensor, arg: Tensor) -> Tensor:
    return _tables(255 - _ramp(arg), len(x))


def _posterize(x: Tensor, bits: Tensor) -> Tensor:
    unit = torch.pow(2, 8 - bits).view(-1, 1, 1)
    return _tables((_ramp(bits) / unit).floor() * unit, len(x))


def _solarize(x: Tensor, threshold: Tensor) -> Tensor:
    ramp = _ramp(threshold)
    return _tables(torch.where(ramp < threshold.view(-1, 1, 1), ramp, 255 - ramp), len(x))


def _solarize_add(x: Tensor, add: Tensor) -> Tensor:
    ramp = _ramp(add)
    return _tables(torch.where(ramp < 128, ramp + add.view(-1, 1, 1), ramp), len(x))


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return _tables(factor.view(-1, 1, 1) * _ramp(factor), len(x))


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    pixels = x.shape[2] * x.shape[3]
    total = _grey(x).sum((1, 2))  # int64
    mean = (2 * total + pixels).div(2 * pixels, rounding_mode="floor").float().view(-1, 1, 1)
    return _tables(_blended(mean, _ramp(factor).float(), factor), len(x))


# Parameters of the other kinds.


def _factor(x: Tensor, factor: Tensor) -> Tensor:
    return factor


def _radians(x: Tensor, degrees: Tensor) -> Tensor:
    return degrees.deg2rad()


def _shear_x(x: Tensor, slope: Tensor) -> Tensor:
    return slope.unsqueeze(1) * (torch.arange(x.shape[2], device=x.device) + 0.5)


def _shear_y(x: Tensor, slope: Tensor) -> Tensor:
    return slope.unsqueeze(1) * (torch.arange(x.shape[3], device=x.device) + 0.5)


def _translate_x(x: Tensor, share: Tensor) -> Tensor:
    return (share * x.shape[3]).unsqueeze(1).expand(-1, x.shape[2])


def _translate_y(x: Tensor, share: Tensor) -> Tensor:
    return (share * x.shape[2]).unsqueeze(1).expand(-1, x.shape[3])


class Operation(NamedTuple):
    """An operation of RandAugment: its argument for a level in [0, 1], and how it is applied.

    `parameters` computes parameters from images and arguments; `kind` changes the images with them.
    """

    name: str  # timm's
    argument: Callable[[float, Generator], float]
    parameters: Callable[[Tensor, Tensor], Tensor]
    kind: Callable[[Tensor, Tensor], Tensor]


# In timm's order.
OPERATIONS = (
    Operation("AutoContrast", lambda level, rng: 0.0, _auto_contrast, _looked_up),
    Operation("Equalize", lambda level, rng: 0.0, _equalize, _looked_up),
    Operation("Invert", lambda level, rng: 0.0, _invert, _looked_up),
    Operation("Rotate", lambda level, rng: _either_sign(30 * level, rng), _radians, _rotated),  # degrees
    Operation("PosterizeIncreasing", lambda level, rng: 4 - int(4 * level), _posterize, _looked_up),  # bits kept
    Operation("SolarizeIncreasing", lambda level, rng: 256 - int(256 * level), _solarize, _looked_up),  # threshold
    Operation("SolarizeAdd", lambda level, rng: min(128, int(110 * level)), _solarize_add, _looked_up),
    Operation("ColorIncreasing", _enhancement, _factor, _coloured),
    Operation("ContrastIncreasing", _enhancement, _contrast, _looked_up),
    Operation("BrightnessIncreasing", _enhancement, _brightness, _looked_up),
    Operation("SharpnessIncreasing", _enhancement, _factor, _sharpened),
    Operation("ShearX", lambda level, rng: _either_sign(0.3 * level, rng), _shear_x, _shifted_rows),
    Operation("ShearY", lambda level, rng: _either_sign(0.3 * level, rng), _shear_y, _shifted_columns),
    Operation("TranslateXRel", lambda level, rng: _either_sign(0.45 * level, rng), _translate_x, _shifted_rows),
    Operation("TranslateYRel", lambda level, rng: _either_sign(0.45 * level, rng), _translate_y, _shifted_columns),
)
