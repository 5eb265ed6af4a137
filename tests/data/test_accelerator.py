"""Augmentation on the fake accelerator: the CPU's pixels, and the host never waits."""

from __future__ import annotations

import pytest
import torch

from data.augment import OPERATIONS, augment, concatenated, draw, generator
from data.transforms import Mixup
from tests.data.test_augment import textured
from tests.helpers.accelerator import MARKS, Accelerator

pytestmark = MARKS


@pytest.mark.parametrize("seed", range(3))
def test_augmentation_equals_the_cpus_and_the_host_waits_for_nothing(seed):
    rng, x = generator("draws", seed), textured(64, 32, 32)
    draws = concatenated([draw(rng, 32, flip=0.5, heavy=True) for _ in x])
    assert set(range(len(OPERATIONS))) <= set(draws.op.flatten().tolist())
    expected = augment(x, draws)
    with Accelerator() as mode:
        pinned = x.pin_memory()
        found = augment(pinned.to("fake", non_blocking=True), draws)
        with mode.allowed("_to_copy"):
            assert torch.equal(found.cpu(), expected)


def test_mixup_equals_the_cpus():
    mix, x, y = Mixup(num_classes=4, label_smoothing=0.1), textured(8, 16, 16).double(), torch.arange(8) % 4
    with Accelerator() as mode:
        there = [value.pin_memory().to("fake", non_blocking=True) for value in (x, y)]
        for step in range(10):  # both kinds
            found = mix(*there, seed=0, step=step, block=0)
            with mode.allowed("_to_copy"):
                torch.testing.assert_close(
                    [value.cpu() for value in found], list(mix(x, y, seed=0, step=step, block=0))
                )
