"""The overfitting watch on curves of real runs, and on what must not be taken for catastrophic overfitting."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from common.flags import load_config
from training.config import TrainConfig
from training.overfitting import OverfittingWatch

PROJECT = Path(__file__).resolve().parents[2]
Curve = list[tuple[float, float]]  # weak, strong by epoch


class Run(NamedTuple):
    """Accuracies in percent under the training attack and under APGD-10, epoch by epoch."""

    weak: list[float]
    strong: list[float]

    @property
    def curve(self) -> Curve:
        return [(weak / 100, strong / 100) for weak, strong in zip(self.weak, self.strong, strict=True)]


# configs/demo_overfitting.yaml with data.seed 0, 1, 2 and an earlier ConvStem, (24, 48) channels; 200 images.
FGSM_RUNS = (
    Run(
        weak=[0, 33, 49.5, 65, 61.5, 69.5, 72, 69.5, 71, 72.5, 83.5, 93.5, 95, 96.5, 95.5, 98.5, 98.5, 99, 98.5, 99],
        strong=[0, 3.5, 25, 35, 28.5, 33.5, 39.5, 37, 23.5, 8, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ),
    Run(
        weak=[0, 40, 53, 63, 65.5, 66, 70, 71.5, 75, 77.5, 75.5, 86.5, 88.5, 76, 87, 85.5, 89, 89.5, 88.5, 90],
        strong=[0, 9.5, 26, 41.5, 37, 40, 33.5, 28.5, 27, 6.5, 5, 0, 0, 0, 0.5, 1.5, 1.5, 0, 0, 0],
    ),
    Run(
        weak=[10, 36, 57, 54.5, 66.5, 69, 67.5, 67.5, 77, 77, 79.5, 83.5, 85, 88, 92.5, 93.5, 93.5, 92.5, 92.5, 93],
        strong=[0, 8.5, 25.5, 31.5, 38.5, 39, 34, 33, 26, 32, 34, 25.5, 35.5, 9.5, 1.5, 0.5, 1, 0.5, 1, 0],
    ),
)
FIRST_ALARMS = (10, 10, 14)
# The same with adv.attack=apgd, seed 0.
APGD_RUN = Run(
    weak=[0, 19, 40, 54, 58.5, 60.5, 62.5, 66, 63.5, 67.5, 68.5, 69, 71.5, 71, 75, 73.5, 76.5, 77.5, 78, 78],
    strong=[0, 5.5, 24, 39, 44, 48, 53.5, 57, 54, 59, 59, 62.5, 63, 64.5, 63.5, 67.5, 67, 67.5, 68, 66],
)
# FGSM at eps 0.2 with lr 0.002: robustness goes over several epochs; 100 images.
SLOW_RUN = Run(
    weak=[2, 28, 46, 56, 61, 65, 62, 66, 71, 71, 72, 76, 79, 75, 82, 81, 82, 85, 84, 81, 83, 82],
    strong=[0, 2, 22, 34, 28, 35, 28, 35, 30, 26, 25, 20, 26, 24, 19, 8, 13, 3, 1, 0, 0, 0],
)
# FGSM at eps 0.16 with lr 0.008: the training attack gets weaker, but robustness stays; 100 images.
SPARED_RUN = Run(
    weak=[5, 41, 54, 69, 68, 68, 71, 73, 66, 69, 68, 75, 80, 74, 74, 83, 79, 84, 79, 85, 83, 82, 85],
    strong=[0, 19, 41, 51, 52, 54, 54, 60, 51, 56, 44, 60, 60, 58, 56, 56, 61, 58, 61, 58, 56, 64, 58],
)


def alarms(curve: Curve, *, n: int, chance: float = 0.1) -> list[int]:
    """Epochs, from 1, at which the watch speaks."""
    watch = OverfittingWatch(chance=chance)
    return [e for e, (weak, strong) in enumerate(curve, 1) if watch.update(epoch=e, strong=strong, weak=weak, n=n)]


def sampled(curve: Curve, *, n: int, seed: int) -> Curve:
    """The curve as `n` images would show it."""
    generator = np.random.default_rng(seed)
    return [(generator.binomial(n, weak) / n, generator.binomial(n, strong) / n) for weak, strong in curve]


def collapse(*, before: int = 10, weak: float = 0.6, strong: float = 0.5) -> Curve:
    return [(weak, strong)] * before + [(0.8, 0.3 * strong), (0.97, 0.0), (0.98, 0.0)]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fgsm_runs_are_reported_at_the_collapse_and_to_their_end(seed: int):
    run = FGSM_RUNS[seed]
    epochs = len(run.strong)
    after_warmup = range(6, epochs + 1)
    collapse_epoch = next(e for e in after_warmup if run.strong[e - 1] < max(run.strong[:e]) / 3)
    first = FIRST_ALARMS[seed]
    assert alarms(run.curve, n=200) == list(range(first, epochs + 1))
    assert abs(first - collapse_epoch) <= 1


def test_the_same_run_with_two_steps_is_silent():
    assert alarms(APGD_RUN.curve, n=200) == []


def test_a_slow_loss_is_reported_once_little_is_left():
    assert alarms(SLOW_RUN.curve, n=100)[0] == 18


def test_a_weaker_training_attack_alone_is_silent():
    assert alarms(SPARED_RUN.curve, n=100) == []


def test_the_recorded_runs_are_the_config():
    """If the config changes, the curves have to be recorded again."""
    config = load_config(TrainConfig, ["--config-file", str(PROJECT / "configs/demo_overfitting.yaml")])
    assert (config.adv.attack, config.adv.eps, config.adv.noise_level, config.lr.lr) == ("fgsm", 0.2, 0, 6e-3)
    assert config.validation.adv_n_ex == 200 and config.validation.freq == 1
    assert all(len(run.strong) == config.training.epochs for run in (*FGSM_RUNS, APGD_RUN))


def test_a_collapse_is_reported_at_its_first_epoch_and_at_every_one_after_it():
    assert alarms(collapse(), n=512) == [11, 12, 13]


def test_noise_in_the_weak_accuracy_hides_no_collapse():
    assert alarms([(0.95, 0.8), (0.93, 0.0)], n=512) == [2]


def test_the_sentence_has_the_numbers():
    watch = OverfittingWatch(chance=0.1)
    assert watch.update(epoch=3, strong=0.5, weak=0.6, n=512) is None
    sentence = watch.update(epoch=4, strong=0.01, weak=0.975, n=512)
    assert sentence == (
        "Catastrophic overfitting at epoch 4: accuracy under the stronger attack fell from 50.0% (epoch 3) to 1.0%, while "
        "accuracy under the training attack changed from 60.0% to 97.5%."
    )


def test_silent_again_after_recovery_and_the_best_epoch_stays():
    watch = OverfittingWatch(chance=0.1)
    said = [watch.update(epoch=e, strong=s, weak=0.9, n=512) for e, s in enumerate([0.4, 0.5, 0.0, 0.45, 0.0], 1)]
    assert [text is not None for text in said] == [False, False, True, False, True]
    assert watch.best == {"epoch": 2, "strong": 0.5, "weak": 0.9}
    assert "50.0% (epoch 2)" in said[4]


@pytest.mark.parametrize("n", [128, 512])
@pytest.mark.parametrize("level", [(0.13, 0.11), (0.3, 0.25), (0.6, 0.5), (0.97, 0.95)])
def test_noise_of_few_images_is_no_collapse(n: int, level: tuple[float, float]):
    for seed in range(20):
        assert alarms(sampled([level] * 300, n=n, seed=seed), n=n) == []


def test_few_images_do_not_show_a_small_fall_and_many_do():
    curve = [(0.3, 0.2), (0.4, 0.08)]
    assert alarms(curve, n=64) == []
    assert alarms(curve, n=512) == [2]


def test_robust_overfitting_is_silent():
    """Accuracies under both attacks decline together, far and slowly."""
    best = [(0.2 + 0.04 * e, 0.15 + 0.04 * e) for e in range(10)]
    decline = [(0.56 - 0.002 * e, 0.51 - 0.002 * e) for e in range(200)]
    for seed in range(20):
        assert alarms(sampled(best + decline, n=512, seed=seed), n=512) == []


def test_a_general_breakdown_is_silent():
    assert alarms([(0.6, 0.5)] * 5 + [(0.1, 0.1), (0.1, 0.0), (0.0, 0.0)], n=512) == []
    assert alarms([(0.6, 0.5)] * 5 + [(0.45, 0.05)], n=512) == []


def test_leaving_a_constant_network_is_silent():
    """Constant predictions are right for one class in ten under every attack; learning gives this up."""
    stuck = [(0.1, 0.1), (0.12, 0.12), (0.1, 0.1)]
    assert alarms([*stuck, (0.3, 0.0), (0.6, 0.02)], n=512) == []
    assert alarms([*stuck, (0.3, 0.0), (0.6, 0.02)], n=512, chance=0.0) != []
    assert alarms([(0.5, 0.52), (0.6, 0.2)], n=512, chance=0.5) == []


def test_low_robust_accuracy_of_many_classes_can_be_lost_too():
    assert alarms([(0.002, 0.002), (0.03, 0.02), (0.08, 0.06), (0.3, 0.002)], n=512, chance=1e-3) == [4]


def test_a_run_that_never_was_robust_is_silent():
    assert alarms([(0.9, 0.0)] * 5, n=512) == []


def test_state_resumes_where_it_was():
    curve = collapse(before=3)
    for cut in range(len(curve) + 1):
        watch = OverfittingWatch(chance=0.1)
        for epoch, (weak, strong) in enumerate(curve[:cut], 1):
            watch.update(epoch=epoch, strong=strong, weak=weak, n=512)
        successor = OverfittingWatch(chance=0.1, best=watch.best)
        for epoch, (weak, strong) in enumerate(curve[cut:], cut + 1):
            numbers = {"epoch": epoch, "strong": strong, "weak": weak, "n": 512}
            assert successor.update(**numbers) == watch.update(**numbers)


def test_state_is_plain_and_a_copy():
    watch = OverfittingWatch(chance=0.1)
    assert watch.best is None
    watch.update(epoch=1, strong=0.4, weak=0.5, n=512)
    best = watch.best
    watch.update(epoch=2, strong=0.5, weak=0.5, n=512)
    assert best == {"epoch": 1, "strong": 0.4, "weak": 0.5}
    assert all(type(value) in (int, float) and math.isfinite(value) for value in best.values())
