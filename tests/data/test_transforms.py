"""Transforms compared with Pillow, timm's own geometry, and the definition of mixup."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import RandomResizedCrop

from common.errors import UserError
from data.transforms import Mixup, NoiseErasing, _rand_augment, eval_transform, seeded, train_transform
from tests.data import picture


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)


def global_draws() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), torch.rand(()).item()


class TestSeeded:
    def test_same_key_same_draws(self) -> None:
        def draws(*key: int | str) -> tuple[float, float, float]:
            with seeded(*key):
                return global_draws()

        assert draws("a", 1, 2) == draws("a", 1, 2)
        keys = [("a", 1, 2), ("a", 2, 1), ("b", 1, 2), ("a", 12)]
        assert all(len(set(values)) == len(keys) for values in zip(*(draws(*key) for key in keys), strict=True))

    @pytest.mark.parametrize("fail", [False, True])
    def test_leaves_the_global_generators_as_they_were(self, fail: bool) -> None:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        expected = global_draws()
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        try:
            with seeded("anything"):
                global_draws()
                if fail:
                    raise KeyError
        except KeyError:
            pass
        assert global_draws() == expected


class TestEvaluation:
    @pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 300), (40, 41), (64, 64)])
    @pytest.mark.parametrize(("size", "crop_pct", "resized"), [(32, 0.875, 36), (50, 0.875, 57), (48, 1.0, 48)])
    def test_is_pillows_resize_and_crop(
        self, width: int, height: int, size: int, crop_pct: float, resized: int
    ) -> None:
        image = picture(1, width, height)
        short, long = min(width, height), max(width, height)
        scaled = [resized, int(resized * long / short)] if width <= height else [int(resized * long / short), resized]
        large = image.resize(tuple(scaled), Image.Resampling.BICUBIC)
        left, top = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
        expected = pixels(large.crop((left, top, left + size, top + size)))
        for transform in (eval_transform(size, crop_pct), train_transform(2, size, crop_pct=crop_pct)):
            x = transform(image)
            assert x.dtype == torch.float32 and torch.equal(x, expected)


class TestBasic:
    def test_is_a_bicubic_resized_crop_and_a_flip(self) -> None:
        image, flips = picture(1, 90, 60), 0
        transform = train_transform(0, 24, min_scale=0.3, flip=0.5)
        for trial in range(40):
            with seeded(trial):
                x = transform(image)
            with seeded(trial):
                top, left, height, width = RandomResizedCrop.get_params(image, [0.3, 1.0], [3 / 4, 4 / 3])
                flip = bool(torch.rand(1) < 0.5)
            crop = image.crop((left, top, left + width, top + height)).resize((24, 24), Image.Resampling.BICUBIC)
            assert torch.equal(x, pixels(ImageOps.mirror(crop) if flip else crop))
            assert height * width >= 0.3 * 90 * 60 * 0.95  # rounded to pixels
            flips += flip
        assert 8 < flips < 32

    @pytest.mark.parametrize("flip", [0.0, 1.0])
    def test_flip_probability(self, flip: float) -> None:
        dark_left = Image.fromarray(np.tile(np.linspace(0, 255, 40, dtype=np.uint8)[None, :, None], (40, 1, 3)))
        for trial in range(20):
            with seeded(trial):
                x = train_transform(0, 16, flip=flip)(dark_left)
            assert (x[0, 0, 0] > x[0, 0, -1]) == bool(flip)

    @pytest.mark.parametrize("augmentation", [0, 1, 2])
    @pytest.mark.parametrize(("width", "height"), [(1, 1), (2, 1), (1, 60), (60, 1), (3, 2)])
    def test_tiny_images(self, augmentation: int, width: int, height: int) -> None:
        for trial in range(20):
            with seeded(trial):
                assert train_transform(augmentation, 16)(picture(1, width, height)).shape == (3, 16, 16)

    def test_unknown_augmentation(self) -> None:
        with pytest.raises(ValueError, match="0 .basic., 1 .heavy. or 2 .none., got 3"):
            train_transform(3, 32)


class TestHeavy:
    def test_stays_in_range(self) -> None:
        transform, images = train_transform(1, 32), [picture(i, 60, 50) for i in range(5)]
        results = []
        for trial in range(400):
            with seeded(trial):
                results.append(transform(images[trial % 5]))
        x = torch.stack(results)
        assert x.shape == (400, 3, 32, 32) and x.dtype == torch.float32
        assert x.isfinite().all() and x.min() >= 0 and x.max() <= 1
        assert len({result.sum().item() for result in results}) > 390

    def test_rand_augment_is_the_one_of_the_recipe(self) -> None:
        augment = _rand_augment()
        assert augment.num_layers == 2 and len(augment.ops) == 15
        for op in augment.ops:
            assert (op.magnitude, op.magnitude_std, op.prob) == (9, 0.5, 0.5)
            assert op.kwargs == {"fillcolor": (0, 0, 0), "resample": Image.Resampling.BICUBIC}
        names = {op.name for op in augment.ops}
        assert {"PosterizeIncreasing", "SolarizeIncreasing", "TranslateXRel"} <= names  # "inc1"

    @pytest.mark.parametrize(("magnitude", "bits"), [(10, 0), (9, 1), (5, 2), (0, 4)])
    def test_posterize_keeps_the_top_bits_down_to_none(self, magnitude: int, bits: int) -> None:
        (op,) = (op for op in _rand_augment().ops if op.name == "PosterizeIncreasing")
        op.magnitude, op.magnitude_std, op.prob = magnitude, 0, 1.0
        image = picture(1)
        expected = np.asarray(image) & (0xFF << (8 - bits) & 0xFF)
        assert np.array_equal(np.asarray(op(image)), expected)


class TestNoiseErasing:
    MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

    def test_is_timms_erasing_of_the_normalised_image(self) -> None:
        x, erased = torch.rand(3, 30, 40, generator=torch.Generator().manual_seed(0)), 0
        for trial in range(100):
            before = x.clone()
            with seeded(trial):
                result = NoiseErasing(probability=0.5)(x)
            with seeded(trial):
                timms = RandomErasing(0.5, mode="pixel", device="cpu")((x - self.MEAN) / self.STD)
            torch.testing.assert_close(result, (timms * self.STD + self.MEAN).clamp(0, 1), rtol=0, atol=1e-6)
            assert torch.equal(x, before) and result.min() >= 0 and result.max() <= 1
            erased += not torch.equal(result, x)
        assert 30 < erased < 70

    def test_frequency_rectangle_and_noise_of_the_recipe(self) -> None:
        erase = train_transform(1, 32).transforms[-1]
        assert isinstance(erase, NoiseErasing)
        x, shares, noise = torch.full((3, 32, 32), 2.0), [], []  # 2 is no colour, so it marks the unchanged pixels
        for trial in range(1200):
            with seeded(trial):
                changed = erase(x)
            mask = (changed != 2).all(0)
            if mask.any():
                rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
                assert mask.sum() == len(rows) * len(columns)
                assert len(rows) == rows[-1] - rows[0] + 1 and len(columns) == columns[-1] - columns[0] + 1
                shares.append(mask.float().mean().item())
                noise.append(changed[:, mask])
        assert 0.21 < len(shares) / 1200 < 0.29
        assert 0.01 < min(shares) < 0.05 and 0.28 < max(shares) < 0.37
        # Mean of the noise, hardly shifted by clamping, in each channel.
        torch.testing.assert_close(torch.cat(noise, 1).mean(1), self.MEAN.flatten(), rtol=0, atol=0.01)


class TestMixup:
    CLASSES = 7

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        return torch.rand(6, 3, 20, 24, generator=generator), torch.arange(6)  # each differs from its partner

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_against_its_definition(self, smoothing: float) -> None:
        mix, (x, y) = Mixup(num_classes=self.CLASSES, label_smoothing=smoothing), self.batch()
        off = smoothing / self.CLASSES
        kinds, shares = [], []
        for step in range(300):
            x_mixed, y_mixed = mix(x, y, seed=1, step=step, block=0)
            assert y_mixed.shape == (6, self.CLASSES) and y_mixed.dtype == x_mixed.dtype == torch.float32
            lam = ((y_mixed[0, y[0]] - off) / (1 - smoothing)).item()
            # Soft labels: lam of the own class, the rest of the partner's, smoothing spread over all.
            one_hot = torch.eye(self.CLASSES)[y]
            expected = (lam * one_hot + (1 - lam) * one_hot.flip(0)) * (1 - smoothing) + off
            torch.testing.assert_close(y_mixed, expected, rtol=0, atol=1e-6)
            torch.testing.assert_close(y_mixed.sum(1), torch.ones(6))
            cut = (x_mixed != x).all(1)
            is_cutmix = torch.equal(x_mixed, torch.where(cut[:, None], x.flip(0), x))
            if is_cutmix:
                assert (cut == cut[0]).all()
                assert cut[0].sum() == cut[0].any(0).sum() * cut[0].any(1).sum()  # a rectangle
                assert lam == pytest.approx(1 - cut[0].float().mean().item(), abs=1e-6)
            else:
                torch.testing.assert_close(x_mixed, lam * x + (1 - lam) * x.flip(0), rtol=0, atol=1e-6)
                shares.append(lam)
            kinds.append(is_cutmix)
        assert 0.4 < np.mean(kinds) < 0.6
        # Beta(0.8, 0.8): mean 1/2, variance 1 / (4 · 2.6).
        assert np.mean(shares) == pytest.approx(0.5, abs=0.1) and np.var(shares) == pytest.approx(0.096, abs=0.025)

    def test_depends_on_seed_step_and_block_only(self) -> None:
        mix, (x, y) = Mixup(num_classes=self.CLASSES, label_smoothing=0.1), self.batch()
        x_before, y_before = x.clone(), y.clone()
        first = mix(x, y, seed=1, step=2, block=3)
        np.random.seed(5)
        expected = np.random.rand()
        np.random.seed(5)
        again = mix(x, y, seed=1, step=2, block=3)
        assert np.random.rand() == expected
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        for key in (
            {"seed": 2, "step": 2, "block": 3},
            {"seed": 1, "step": 3, "block": 3},
            {"seed": 1, "step": 2, "block": 2},
        ):
            assert not torch.equal(first[1], mix(x, y, **key)[1])
        assert torch.equal(x, x_before) and torch.equal(y, y_before)

    def test_options(self) -> None:
        x, y = self.batch()
        never = Mixup(num_classes=self.CLASSES, label_smoothing=0.0, prob=0.0)(x, y, seed=0, step=0, block=0)
        assert torch.equal(never[0], x) and torch.equal(never[1], torch.eye(self.CLASSES)[y])
        for step in range(20):
            cut, _ = Mixup(num_classes=self.CLASSES, label_smoothing=0.0, switch_prob=1.0)(
                x, y, seed=0, step=step, block=0
            )
            assert ((cut == x) | (cut == x.flip(0))).all()

    def test_odd_batch(self) -> None:
        x, y = self.batch()
        with pytest.raises(UserError, match="expected an even number.*got 5"):
            Mixup(num_classes=self.CLASSES, label_smoothing=0.0)(x[:5], y[:5], seed=0, step=0, block=0)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_same_on_a_gpu(self) -> None:
        mix, (x, y) = Mixup(num_classes=self.CLASSES, label_smoothing=0.1), self.batch()
        for step in range(10):
            here = mix(x, y, seed=0, step=step, block=0)
            there = mix(x.cuda(), y.cuda(), seed=0, step=step, block=0)
            for a, b in zip(here, there, strict=True):
                assert b.is_cuda
                torch.testing.assert_close(a, b.cpu(), rtol=0, atol=1e-6)
