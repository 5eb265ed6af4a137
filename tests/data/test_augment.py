"""Batched augmentation compared with timm and Pillow: operation by operation, and over many draws."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import RandomResizedCrop

from data.augment import (
    OPERATIONS,
    Draws,
    _apply_by_kind,
    _apply_layer,
    _operations,
    augment,
    concatenated,
    draw,
    draw_crop,
    generator,
)
from data.pipeline import to_unit, train_pipeline
from data.transforms import _rand_augment
from tests.data import encoded

OPTIONS = {"min_scale": 0.08, "flip": 0.5, "crop_pct": 0.875}
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


def textured(count: int, height: int = 96, width: int = 96) -> torch.Tensor:
    """Return uint8 (count, 3, height, width): shapes and noise on gradients; the last is flat, the one before nearly so."""
    rng = np.random.default_rng(0)
    down, across = np.mgrid[:height, :width]
    images = []
    for i in range(count - 2):
        waves = np.stack([np.sin(across / (3 + i + c)) * np.cos(down / (5 + c)) for c in range(3)])
        noise = rng.normal(0, 6, (3, height, width))
        images.append((128 + (20 + 12 * i) * waves + noise + (across > width / 2) * 25).clip(0, 255).astype(np.uint8))
    images += [
        np.full((3, height, width), 90, np.uint8) + (across % 2).astype(np.uint8),
        np.full((3, height, width), 7, np.uint8),
    ]
    return torch.from_numpy(np.stack(images))


def pillow(x: torch.Tensor) -> Image.Image:
    return Image.fromarray(x.permute(1, 2, 0).numpy())


def draws(count: int, *, op: int = -1, arg: list[float] | None = None, flip: bool = False) -> Draws:
    ops = torch.full((count, 2), -1)
    ops[:, 0] = op
    args = torch.zeros(count, 2)
    args[:, 0] = torch.tensor(arg if arg is not None else [0.0] * count)
    box = torch.zeros(count, 4, dtype=torch.int64)
    return Draws(torch.full((count,), flip), ops, args, box, torch.empty(0, dtype=torch.uint8))


def timms(name: str) -> AugmentOp:
    (op,) = (op for op in _rand_augment().ops if op.name == name)
    return op


class TestOperations:
    def test_are_timms_in_its_order(self) -> None:
        assert [op.name for op in OPERATIONS] == [op.name for op in _rand_augment().ops]

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("shape", [(96, 96), (60, 90)])
    @pytest.mark.parametrize("place", range(15), ids=[op.name for op in OPERATIONS])
    def test_changes_pixels_as_timm_does(self, place: int, shape: tuple[int, int], device: str) -> None:
        operation, x, rng = OPERATIONS[place], textured(8, *shape), generator("test", place)
        args = [operation.argument(level, rng) for level in (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.9, 0.9)]
        theirs = timms(operation.name)
        integer = operation.name.startswith(("Posterize", "Solarize"))  # timm's arguments of these are
        given = [(int(a) if integer else a,) if theirs.level_fn else () for a in args]
        expected = [np.asarray(theirs.aug_fn(pillow(i), *a, **theirs.kwargs)) for i, a in zip(x, given)]
        found = augment(x.to(device), draws(8, op=place, arg=args)).cpu().permute(0, 2, 3, 1).numpy()
        difference = np.abs(found.astype(int) - np.stack(expected))
        if operation.name == "Rotate":  # cubic convolution with another constant
            assert difference.mean((1, 2, 3)).max() < 2
        else:
            assert difference.mean() < 0.02 and difference.max() <= 1

    def test_tiny_images(self) -> None:
        for height, width in [(1, 1), (2, 3), (8, 1)]:
            x = torch.randint(0, 256, (15, 3, height, width), dtype=torch.uint8)
            wanted = draws(15)
            wanted.op[:, 0] = torch.arange(15)
            wanted.arg[:, 0] = 0.5
            assert augment(x, wanted).shape == x.shape

    def test_equalize_knows_all_levels(self) -> None:
        """Few pixels may share many levels, or one level may have nearly all pixels."""
        images = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
        images[0] = torch.arange(256, dtype=torch.uint8).view(16, 16)
        images[1, :, 0, 0], images[2, :, :8] = 200, 3
        found = augment(images, draws(3, op=1))
        expected = [np.asarray(timms("Equalize").aug_fn(pillow(x))) for x in images]
        assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), np.stack(expected))


class TestAugment:
    @pytest.mark.parametrize("device", DEVICES)
    def test_each_sample_has_its_own(self, device: str) -> None:
        """A sample's result does not depend on the rest of its batch; the input images are unchanged."""
        x = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        single = [draw(generator("own", i), 32, flip=0.5, heavy=True) for i in range(64)]
        before, together = x.clone(), augment(x.to(device), concatenated(single)).cpu()
        assert torch.equal(x, before) and together.dtype == torch.uint8
        alone = torch.cat([augment(x[i : i + 1], single[i]) for i in range(64)])
        if device == "cpu":
            assert torch.equal(together, alone)
        else:  # fused multiplications round otherwise
            assert ((together.int() - alone.int()).abs() > 1).float().mean() < 1e-3

    def test_by_kind_is_image_by_image(self) -> None:
        """The GPU's code, run on the CPU."""
        x = torch.randint(0, 256, (90, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        op, rng = torch.arange(90) % 16 - 1, generator("kinds")
        arg = torch.tensor([OPERATIONS[i].argument(0.9, rng) if i >= 0 else 0.0 for i in op.tolist()])
        one, other = x.clone(), x.clone()
        _apply_layer(one, op, arg), _apply_by_kind(other, op, arg)
        assert torch.equal(one, other) and not torch.equal(one, x) and torch.equal(one[op < 0], x[op < 0])

    def test_layers_come_one_after_the_other(self) -> None:
        x, both = textured(4), draws(4, op=7, arg=[1.5] * 4)
        both.op[:, 1], both.arg[:, 1] = 3, 20.0
        first = augment(x, draws(4, op=7, arg=[1.5] * 4))
        assert torch.equal(augment(x, both), augment(first, draws(4, op=3, arg=[20.0] * 4)))

    def test_flip_comes_before_the_operations_and_erasing_after(self) -> None:
        x, wanted = textured(4), draws(4, op=11, arg=[0.2] * 4, flip=True)
        noise = torch.arange(3 * 5 * 7, dtype=torch.uint8)
        box = wanted.box.clone()
        box[2] = torch.tensor([10, 20, 5, 7])
        found = augment(x, wanted._replace(box=box, noise=noise))
        expected = augment(x.flip(-1), draws(4, op=11, arg=[0.2] * 4))
        expected[2, :, 10:15, 20:27] = noise.view(3, 5, 7)
        assert torch.equal(found, expected)

    def test_sees_any_memory_layout(self) -> None:
        x, wanted = textured(4), draws(4, op=10, arg=[1.7] * 4)
        assert torch.equal(augment(x.to(memory_format=torch.channels_last), wanted), augment(x, wanted))

    @pytest.mark.parametrize(
        ("dtype", "levels"), [(torch.float32, True), (torch.float64, True), (torch.float32, False)]
    )
    def test_to_unit(self, dtype: torch.dtype, levels: bool) -> None:
        x = torch.arange(256, dtype=torch.uint8)
        expected = x.to(dtype) / 255
        assert torch.equal(to_unit(x if levels else expected, dtype), expected)


class TestDraws:
    COUNT = 100_000

    def test_operations_and_arguments_are_timms(self) -> None:
        """10⁵ images each: how often each operation is applied, and the distribution of its argument."""
        seen: list[tuple[str, tuple]] = []
        augment_theirs = _rand_augment()
        for op in augment_theirs.ops:
            op.aug_fn = lambda image, *args, _name=op.name, **_: (seen.append((_name, args)), image)[1]
        random.seed(0), np.random.seed(0)
        for _ in range(self.COUNT):
            augment_theirs(None)
        rng = np.random.RandomState(0)
        ops, arguments = map(np.array, zip(*(_operations(rng) for _ in range(self.COUNT))))
        theirs = Counter(name for name, _ in seen)
        assert np.bincount((ops >= 0).sum(1)) / self.COUNT == pytest.approx([0.25, 0.5, 0.25], abs=0.007)
        for place, operation in enumerate(OPERATIONS):
            args = arguments[ops == place]
            other = np.array([a[0] for name, a in seen if name == operation.name and a])
            assert abs(len(args) - theirs[operation.name]) < 5 * (2 * self.COUNT / 15) ** 0.5
            if len(other):
                values = np.unique(np.concatenate((args, other)))
                actual, timm = (
                    np.searchsorted(np.sort(some), values, side="right") / len(some) for some in (args, other)
                )
                assert np.abs(actual - timm).max() < 0.034  # Kolmogorov–Smirnov, 0.1 %
                assert abs(args.mean() - other.mean()) < 5 * other.std() * (2 / len(args)) ** 0.5
                assert args.std() == pytest.approx(other.std(), rel=0.03, abs=0.02)

    def test_crop_is_timms_and_torchvisions(self) -> None:
        rng, image, device = (
            np.random.RandomState(0),
            Image.new("RGB", (500, 375)),
            torch.empty(3, 375, 500, device="meta"),
        )
        random.seed(0), torch.manual_seed(0)
        drawn = np.array([draw_crop(rng, 375, 500, min_scale=0.08) for _ in range(20_000)])
        ratio = (3 / 4, 4 / 3)
        timm = RandomResizedCropAndInterpolation.get_params
        for theirs in (
            np.array([timm(image, (0.08, 1.0), ratio) for _ in range(20_000)]),
            np.array([RandomResizedCrop.get_params(device, [0.08, 1.0], list(ratio)) for _ in range(4_000)]),
        ):
            scale = 5 * theirs.std(0) * (1 / len(theirs) + 1 / len(drawn)) ** 0.5
            assert (np.abs(drawn.mean(0) - theirs.mean(0)) < scale).all()
            levels = np.linspace(0.01, 0.99, 50)
            distance = np.abs(np.quantile(drawn, levels, axis=0) - np.quantile(theirs, levels, axis=0))
            assert (distance < 0.06 * np.array([375, 500, 375, 500])).all()

    @pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 60), (60, 1), (2000, 10), (10, 2000), (3, 2), (300, 10)])
    def test_crop_of_odd_shapes_lies_inside(self, height: int, width: int) -> None:
        for trial in range(200):
            top, left, h, w = draw_crop(np.random.RandomState(trial), height, width, min_scale=0.08)
            assert top >= 0 and left >= 0 and 0 < h <= height - top and 0 < w <= width - left

    def test_crop_of_a_panorama_is_timms_centre(self) -> None:
        """No crop of these proportions fits: the largest one in the centre."""
        for height, width in [(10, 2000), (2000, 10)]:
            image = Image.new("RGB", (width, height))
            theirs = RandomResizedCropAndInterpolation.get_params(image, (0.9, 1.0), (3 / 4, 4 / 3))
            assert draw_crop(np.random.RandomState(0), height, width, min_scale=0.9) == theirs

    def test_erasing_is_timms(self) -> None:
        """Frequency, area and shape of the rectangle; its noise."""
        erase, found, theirs = RandomErasing(0.25, mode="pixel", device="cpu"), [], []
        random.seed(0)
        rng = np.random.RandomState(0)
        for _ in range(3000):
            x = erase(torch.full((1, 24, 24), torch.nan))[0]
            rows, columns = (~x.isnan()).any(1).sum().item(), (~x.isnan()).any(0).sum().item()
            theirs.append((rows > 0, rows, columns))
            box = draw(rng, 24, flip=0.5, heavy=True).box[0].tolist()
            found.append((box[2] > 0, box[2], box[3]))
            assert box[0] + box[2] <= 24 and box[1] + box[3] <= 24
        found, theirs = np.array(found, float), np.array(theirs, float)
        assert abs(found[:, 0].mean() - theirs[:, 0].mean()) < 0.03
        some, other = found[found[:, 0] > 0], theirs[theirs[:, 0] > 0]
        assert np.abs(some[:, 1:].mean(0) - other[:, 1:].mean(0)).max() < 0.6
        assert np.abs((some[:, 1] * some[:, 2]).std() - (other[:, 1] * other[:, 2]).std()) < 5

    def test_noise_is_imagenets(self) -> None:
        patches: list[list[torch.Tensor]] = [[], [], []]
        for trial in range(300):
            wanted = draw(generator("noise", trial), 48, flip=0.5, heavy=True)
            height, width = wanted.box[0, 2:].tolist()
            assert len(wanted.noise) == 3 * height * width
            for c, part in enumerate(wanted.noise.view(3, -1)):
                patches[c].append(part)
        for channel, mean, std in zip(patches, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)):
            values = torch.cat(channel).double() / 255
            exact = torch.distributions.Normal(mean, std).sample((200_000,)).clamp(0, 1)
            assert values.mean().item() == pytest.approx(exact.mean().item(), abs=0.006)
            assert values.std().item() == pytest.approx(exact.std().item(), abs=0.006)
            a, b = values[:-1] - values.mean(), values[1:] - values.mean()
            assert abs((a * b).mean() / values.var()) < 0.03  # neighbours have nothing to do with each other

    def test_are_a_function_of_the_key(self) -> None:
        fast, jpeg = train_pipeline("fast", 1, 24, **OPTIONS), encoded(1, 80, 60, "JPEG")
        first, again, other = (fast(jpeg, ("sample", 0, 3, index)) for index in (5, 5, 6))
        assert all(map(torch.equal, (first[0], *first[1]), (again[0], *again[1])))
        assert not torch.equal(first[0], other[0])

    def test_are_pinned(self) -> None:
        """With other draws, a run resumed with a new version would differ from its beginning."""
        wanted = draw(generator("sample", 0, 0, 8), 224, flip=0.5, heavy=True)
        assert wanted.op.tolist() == [[0, 10]] and wanted.arg[0, 1].item() == pytest.approx(1.835631251335144)


class TestPipelines:
    def test_basic_shows_the_same_kind_of_images(self) -> None:
        """Over many draws, the mean image and its spread are the same."""
        jpeg, results = encoded(3, 120, 90, "JPEG"), {}
        for name in ("timm", "fast"):
            make = train_pipeline(name, 0, 16, **OPTIONS)
            shown = []
            for trial in range(500):
                x, wanted = make(jpeg, ("trial", name, trial))
                shown.append(to_unit(x[None] if wanted is None else augment(x[None], wanted), torch.float32))
            results[name] = torch.cat(shown)
        for statistic in (torch.mean, torch.std):
            a, b = (statistic(results[name], 0) for name in ("timm", "fast"))
            assert (a - b).abs().max() < 0.08 and (a - b).abs().mean() < 0.025

    def test_none_is_evaluations_transform(self) -> None:
        jpeg = encoded(1, 90, 60, "JPEG")
        (a, none), (b, nothing) = (train_pipeline(name, 2, 24, **OPTIONS)(jpeg, ("key",)) for name in ("timm", "fast"))
        assert none is nothing is None and b.dtype == torch.uint8 and torch.equal(to_unit(b, torch.float32), a)

    def test_unknown_name(self) -> None:
        with pytest.raises(ValueError, match="pipeline: expected one of timm, fast, got 'dali'"):
            train_pipeline("dali", 0, 16, **OPTIONS)
