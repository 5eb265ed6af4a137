"""What a run says of its flags at its start."""

from __future__ import annotations

from typing import Any

import pytest

import train
from common.flags import load_config
from tests.training.helpers import base_flags, run
from training.advice import notes_for
from training.config import TrainConfig

DATA = ("--data.train_dataset=images", "--data.val_dataset=images", "--training.precision=fp32")


def notes(*flags: str, steps: int = 100_000) -> list[str]:
    config = load_config(TrainConfig, [*DATA, *flags])
    return notes_for(config, "cpu", global_batch=config.global_batch, steps=steps)


def test_nothing_is_said_of_flags_that_go_together():
    assert notes() == notes("--adv.attack=apgd", "--adv.eps=0.1", "--model.model_ema=1") == []


def test_radius_of_another_norm():
    assert "an L2 radius of 0.0157 at 160 px" in notes("--adv.attack=apgd", "--adv.norm=L2", "--adv.eps=4/255")[0]


def test_an_attack_that_a_file_declines(tmp_path):
    (tmp_path / "clean.yaml").write_text("adv: {attack: none, eps: 0.1}")
    recipe = ("--config-file", str(tmp_path / "clean.yaml"))
    assert notes(*recipe) == notes(*recipe, "--adv.eps=0.1", "--adv.attack=none") == []
    (note,) = notes(*recipe, "--adv.eps=0.1")
    assert note.startswith("adv.attack is none, so this run trains on clean images although it gets adv.eps;")


@pytest.mark.parametrize(
    ("flags", "random"),
    [
        (["--model.ckpt_path=x", "--model.new_head=1", "--model.freeze_some=1"], True),
        (["--model.ckpt_path=x", "--model.freeze_some=1"], False),
        (["--model.ckpt_path=x", "--model.new_head=1", "--lr.body_factor=0"], False),
        (["--model.num_classes=4", "--model.freeze_some=1"], True),
        (["--model.num_classes=4", "--lr.body_factor=0"], False),
        (["--training.eval_only=1", "--model.ckpt_path=x", "--model.new_head=1"], True),
        (["--training.eval_only=1", "--model.pretrained=0"], True),
        (["--training.eval_only=1"], False),
        (["--training.eval_only=1", "--model.ckpt_path=x"], False),
    ],
)
def test_random_weights_that_stay_so(flags, random):
    assert any("random" in note for note in notes(*flags)) == random


def test_an_attack_that_was_forgotten():
    (note,) = notes("--adv.eps=0.1", "--adv.n_iter=5")
    assert note == (
        "adv.attack is none, so this run trains on clean images although it gets adv.eps, adv.n_iter; for adversarial "
        "training give --adv.attack=apgd, for clean training give --adv.attack=none"
    )
    assert notes("--adv.eps=0.1", "--adv.attack=none") == notes("--adv.eps=0.1", "--training.eval_only=1") == []
    assert "adv.n_iter has no effect" in notes("--adv.n_iter=5", "--adv.attack=none")[0]


@pytest.mark.parametrize(
    ("flags", "remedies"),
    [
        (
            ["--training.batch_size=80"],
            "uses 80; give --training.grad_accum=8, or a proportional learning rate, --lr.lr=0.000125",
        ),
        (["--training.batch_size=80", "--training.grad_accum=2"], "uses 160; give --training.grad_accum=8, or"),
        (["--training.batch_size=96"], "uses 96; give a proportional learning rate, --lr.lr=0.00015"),
        (["--training.batch_size=1280"], "uses 1280; give a proportional learning rate, --lr.lr=0.002"),
        (
            ["--training.distributed=1", "--dist.world_size=2", "--training.batch_size=80"],
            "give --training.grad_accum=4, or",
        ),
    ],
)
def test_another_global_batch_than_the_learning_rate_is_meant_for(flags, remedies):
    (note,) = notes("--training.global_batch=640", *flags)
    assert note.startswith(
        "training.global_batch: the learning rate is meant for 640 images per step, but this run uses "
    )
    assert remedies in note


def test_the_same_global_batch_is_no_news_and_the_flag_no_other_run():
    same = ("--training.batch_size=80", "--training.grad_accum=8")
    assert notes("--training.global_batch=640", *same) == []
    named = [load_config(TrainConfig, [*DATA, *same, *more]).run_name for more in ([], ["--training.global_batch=1"])]
    assert named[0] == named[1]


@pytest.mark.parametrize(("steps", "share", "decay"), [(66, "99%", 0.965), (20_010, "14%", 0.99988), (1, "100%", 0.1)])
def test_an_average_that_is_the_initial_network(steps, share, decay):
    (note,) = notes("--model.model_ema=1", steps=steps)
    assert note == (
        f"model.ema_decay: after the run's {steps} steps {share} of the EMA are still the initial weights; give "
        f"--model.ema_warmup=1, or --model.ema_decay={decay:g}"
    )
    assert decay**steps <= 0.1 and notes("--model.model_ema=1", f"--model.ema_decay={decay}", steps=steps) == []
    assert notes("--model.model_ema=1", "--model.ema_warmup=1", steps=steps) == []


def check(flags: dict[str, Any]) -> None:
    assert train.main(["--check", *(f"--{name}={value}" for name, value in flags.items() if value is not None)]) == 0


def test_a_learning_rate_below_the_end_of_its_schedule():
    (note,) = notes("--lr.lr=1e-6")
    assert "1e-06 is below 5e-06" in note and "rises" in note
    assert notes("--lr.lr=1e-6", "--lr.lr_schedule_type=cyclic") == notes("--lr.lr=5e-6") == []


def test_a_radius_that_is_not_reached():
    flags = ("--adv.attack=apgd", "--adv.eps=0.1", "--training.epochs=20")
    (note,) = notes(*flags, "--adv.eps_warmup_epochs=40")
    assert "reaches only 0.05 in the run's 20 epochs, not adv.eps=0.1; give at most 20" in note
    assert notes(*flags, "--adv.eps_warmup_epochs=20") == []


@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        (["--lr.body_factor=0", "--model.pretrained=0"], "lr.body_factor=0"),
        (["--lr.body_factor=0"], None),
        (["--lr.body_factor=0", "--model.not_original=1"], "lr.body_factor=0"),  # the stem is new
        (["--lr.body_factor=0", "--model.pretrained=0", "--model.ckpt_path=w.pt"], None),
        (["--lr.body_factor=0", "--model.pretrained=0", "--training.resume=run"], None),
        (["--model.freeze_some=1", "--model.not_original=1"], None),
        (["--model.freeze_some=1", "--model.not_original=1", "--model.early=0"], "model.freeze_some=1"),
        (["--model.freeze_some=1", "--model.pretrained=0"], "model.freeze_some=1"),
        (["--model.pretrained=0"], None),
    ],
)
def test_frozen_weights_that_are_random(flags, flag):
    found = notes(*flags)
    assert [note.split(":")[0] for note in found] == ([flag] if flag else [])


def test_a_run_and_its_check_say_it_once(images, tmp_path, capsys):
    flags = base_flags(images, tmp_path) | {"adv.eps": 0.1, "training.global_batch": 64, "model.model_ema": 1}
    for start in (check, run):
        start(flags)
        errors = capsys.readouterr().err
        for words in (
            "warning: adv.attack is none, so this run trains on clean images although it gets adv.eps",
            "--training.grad_accum=8",
            "after the run's 3 steps 100%",
        ):
            assert errors.count(words) == 1
    check(base_flags(images, tmp_path) | {"training.precision": None})
    assert capsys.readouterr().err == ""  # the device of the job is not known


def test_the_check_counts_the_processes_of_the_job(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    check(base_flags(images, tmp_path) | {"training.global_batch": 48, "model.model_ema": 1})
    errors = capsys.readouterr().err
    assert "this run uses 24; give --training.grad_accum=2" in errors and "after the run's 1 steps 100%" in errors


def test_a_forgotten_attack_where_the_clean_run_is_finished(images, tmp_path, capsys):
    flags = base_flags(images, tmp_path) | {"training.resume": "auto"}
    run(flags)
    for start in (check, run):
        start(flags | {"adv.eps": 0.1})
        output = capsys.readouterr()
        assert "is finished; --training.resume=none" in output.out
        assert "warning: adv.attack is none, so this run trains on clean images although" in output.err
    check(flags | {"adv.eps": 0.1, "adv.attack": "none"})
    assert capsys.readouterr().err == ""


def test_an_adversarial_run_without_best_weights():
    assert "no best weights are saved" in notes("--adv.attack=apgd", "--validation.adv_n_ex=0")[0]
