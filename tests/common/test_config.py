"""Flags and config files: accepted values, rejected values, and error messages."""

from __future__ import annotations

import json

import pytest
import yaml

import train
from common.errors import Problems, UserError
from common.flags import config_to_dict, load_config
from evaluation.config import EvalConfig
from training.config import TrainConfig

DATA = ["--data.train_dataset=a", "--data.val_dataset=b", "--data.num_workers=1", "--data.in_memory=0"]
# The published launcher's line (reference recipe), placeholders filled.
PUBLISHED = (
    "--data.num_workers=12 --data.in_memory=1 --data.train_dataset=/data/train --data.val_dataset=/data/val "
    "--logging.folder=runs --logging.log_level 2 --adv.attack apgd --adv.n_iter 2 --adv.norm Linf --training.distributed 1 "
    "--training.batch_size 80 --lr.lr 1e-3 --logging.save_freq 2 --resolution.min_res 224 --resolution.max_res 224 "
    "--data.seed 0 --data.augmentations 1 --model.add_normalization 0 --model.not_original 1 --model.model_ema 1 "
    "--lr.lr_peak_epoch 20 --training.label_smoothing 0.1 --logging.addendum=x --dist.world_size 8 --training.distributed 1 "
    "--model.pretrained 0 --model.arch convnext_base --training.epochs 300"
)


def load(*flags):
    return load_config(TrainConfig, [*DATA, *flags])


def refused(*flags):
    with pytest.raises(UserError) as error:
        load(*flags)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_published_defaults():
    """The published defaults, except arch (effnet_b0 cannot be built any more) and port (two runs on a machine)."""
    expected = {
        "model": "arch convnext_tiny, pretrained 1, ckpt_path '', add_normalization 1, not_original 0, updated 0, model_ema 0, "
        "freeze_some 0, early 1",
        "resolution": "min_res 160, max_res 160, start_ramp 0, end_ramp 0",
        "data": "seed 0, augmentations 0",
        "lr": "lr 1e-3, lr_schedule_type cosine, lr_peak_epoch 10, step_ratio 0.1, step_length 30",
        "logging": "log_level 1, save_freq 2, addendum ''",
        "validation": "batch_size 64, resolution 224, lr_tta 0, precision fp16",
        "training": "eval_only 0, batch_size 512, optimizer adamw, momentum 0.9, weight_decay 0.05, epochs 100, "
        "label_smoothing 0.1, distributed 0, use_blurpool 0, precision fp16",
        "dist": "world_size 1, address localhost, port 0",
        "adv": f"attack none, norm Linf, eps {4 / 255}, n_iter 2, verbose 0, noise_level 1, skip_projection 0, alpha 1",
        "misc": "notes '', use_channel_last 1",
    }
    values = config_to_dict(load())
    for section, text in expected.items():
        for name, value in (item.split(" ", 1) for item in text.replace("\n", " ").split(", ")):
            got = values[section][name]
            wanted = {str: str, bool: lambda v: v == "1", int: int, float: float}[type(got)](value.strip("'"))
            assert got == wanted, f"{section}.{name}"


def test_published_launcher_line():
    config = load_config(TrainConfig, PUBLISHED.split())
    assert (config.model.arch, config.training.epochs, config.dist.world_size) == ("convnext_base", 300, 8)
    assert config.data.in_memory is True and config.lr.lr == 1e-3 and config.adv.eps == 4 / 255


def test_last_flag_wins_and_both_forms_work():
    config = load("--lr.lr=1", "--lr.lr", "2", "--adv.alpha", "0.5")
    assert config.lr.lr == 2 and config.adv.alpha == 0.5


@pytest.mark.parametrize(
    "text,value", [("4/255", 4 / 255), ("0.03", 0.03), (" 8 / 255", 8 / 255), ("1e-2", 0.01), ("0.5/255", 0.5 / 255)]
)
def test_eps_takes_fractions(text, value):
    assert load(f"--adv.eps={text}").adv.eps == value


@pytest.mark.parametrize("norm,eps", [("Linf", 4 / 255), ("L2", 2.0), ("L1", 75.0)])
def test_eps_defaults_by_norm(norm, eps):
    assert load(f"--adv.norm={norm}").adv.eps == eps


@pytest.mark.parametrize("given,used", [("0", 0.0), ("1", 0.1), ("0.1", 0.1), ("0.3", 0.3)])
def test_label_smoothing_switch(given, used):
    assert load(f"--training.label_smoothing={given}").label_smoothing == used


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--model.arhc=x"], ["--model.arhc", "--model.arch"]),
        (["--model.pre=0"], ["unknown flag", "--model.pre"]),
        (["--training.epochs=3.5"], ["training.epochs", "integer", "3.5"]),
        (["--training.epochs=0"], ["training.epochs", "at least 1", "0"]),
        (["--lr.lr=-1"], ["lr.lr", "above 0", "-1"]),
        (["--lr.lr=nan"], ["lr.lr", "nan"]),
        (["--adv.eps=4/0"], ["adv.eps", "4/0"]),
        (["--adv.eps=8"], ["adv.eps", "8/255"]),
        (["--adv.norm=linf"], ["adv.norm", "Linf", "'linf'", "did you mean Linf"]),
        (["--model.pretrained=2"], ["model.pretrained", "0 or 1", "2"]),
        (["--model.pretrained=yes"], ["model.pretrained", "0 or 1"]),
        (["--adv.attack=fgsm", "--adv.norm=L2"], ["adv.norm", "fgsm", "L2"]),
        (["--data.augmentations=1", "--training.batch_size=7"], ["training.batch_size", "even", "7"]),
        (["--dist.world_size=2"], ["dist.world_size", "training.distributed"]),
        (["--dist.port=http"], ["dist.port", "http"]),
        (["--resolution.max_res=128"], ["resolution.max_res", "160", "128"]),
        (["--resolution.start_ramp=3"], ["resolution.end_ramp", "3"]),
        (["--training.compile=reduce-overhead", "--training.grad_accum=2"], ["training.compile", "CUDA graphs", "2"]),
        (["--training.compile=fast"], ["training.compile", "max-autotune", "fast"]),
        (["--lr.lr"], ["--lr.lr", "expected one argument"]),
        (["stray"], ["stray"]),
    ],
)
def test_refused(flags, words):
    message = refused(*flags)
    assert all(word in message for word in words), message


def test_required_flags():
    with pytest.raises(UserError, match="data.train_dataset, data.val_dataset.*required"):
        load_config(TrainConfig, [])


def test_a_wrong_required_flag_ends_the_check_of_the_rest(tmp_path):
    file = tmp_path / "flags.yaml"
    file.write_text("data: {train_dataset: a, val_dataset: [b]}")
    with pytest.raises(UserError, match=r"^data.val_dataset: expected text, got \['b'\].$"):
        load_config(TrainConfig, ["--config-file", str(file)], problems=Problems())


def test_environment_is_not_read(monkeypatch):
    monkeypatch.setenv("lr.lr", "7")
    assert load().lr.lr == 1e-3


def test_config_file(tmp_path):
    file, other = tmp_path / "a.yaml", tmp_path / "b.yaml"
    file.write_text("lr: {lr: 0.5, lr_peak_epoch: 3}\nadv.eps: 8/255\ntraining: {batch_size: 6}\n")
    other.write_text("lr: {lr: 0.25}\n")
    config = load("--config-file", str(file), "--config-file", str(other), "--training.batch_size=4")
    assert (config.lr.lr, config.lr.lr_peak_epoch, config.adv.eps, config.training.batch_size) == (0.25, 3, 8 / 255, 4)


def test_params_of_a_run_as_a_config_file(tmp_path):
    """params.json contains all flags; those that the run was given, or that differ from their defaults, count as given."""
    run, file = load("--lr.lr=1", "--adv.alpha=1"), tmp_path / "params.json"
    for provenance, given in (({"given": ["adv.alpha", "lr.lr"]}, {"adv.alpha", "lr.lr"}), ({}, {"lr.lr"})):
        file.write_text(json.dumps(config_to_dict(run) | {"provenance": provenance}))
        again = load("--config-file", str(file), "--training.epochs=30")
        assert again.given - {"data.train_dataset", "data.val_dataset", "training.epochs"} >= given
        assert not again.given & {"training.precision", "training.momentum", "validation.precision"}
        assert ("adv.alpha" in again.given) == ("adv.alpha" in given)


def test_learning_rate_that_never_falls():
    with pytest.raises(UserError, match="Give --lr.lr_peak_epoch=2"):
        load("--training.epochs=10")
    assert load("--training.epochs=10", "--training.resume_force=1").lr.lr_peak_epoch == 10  # an earlier version's run


@pytest.mark.parametrize(
    "text,words",
    [
        ("lr: {lrr: 1}", ["lr.lrr", "lr.lr"]),
        ("lr: {lr: fast}", ["lr.lr", "number", "fast"]),
        ("training: {epochs: true}", ["training.epochs"]),
        ("training: {epochs: 1.5}", ["training.epochs", "1.5"]),
        ("- 1", ["list"]),
        ("a: [", ["YAML"]),
        ("data: {augmentations: }", ["data.augmentations has no value"]),
        ("lr: {lr: {}}", ["lr.lr has no value"]),
        ("lr: {lr: 1, lr: 2}", ["'lr' is given twice"]),
        ("dist: {port: 70000}", ["dist.port", "65535"]),
        ("lr: !!python/object/apply:os.system ['true']", ["YAML"]),
        ("lr: {lr: &x [*x]}", ["bad.yaml", "recursive"]),
        pytest.param("[" * 3000, ["bad.yaml", "nested too deeply"], id="deep"),
        ("lr: {lr: 2024-13-01}", ["bad.yaml", "month must be in 1..12"]),
    ],
)
def test_bad_config_file(tmp_path, text, words):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    message = refused("--config-file", str(file))
    assert all(word in message for word in words), message


def test_empty_section_and_unset_value(tmp_path):
    (tmp_path / "a.yaml").write_text("lr:\nmodel: {drop_path: null}\n")
    assert load("--config-file", str(tmp_path / "a.yaml")) == load()


def test_missing_config_file():
    assert "no-such.yaml" in refused("--config-file=no-such.yaml")


def test_round_trip_through_json_and_yaml(tmp_path):
    config = load("--adv.attack=apgd", "--adv.norm=L2", "--model.drop_path=0.2", "--misc.notes=some text")
    for name, dump in (("c.json", json.dumps), ("c.yaml", yaml.safe_dump)):
        (tmp_path / name).write_text(dump(config_to_dict(config)))
        assert load_config(TrainConfig, ["--config-file", str(tmp_path / name)]) == config


def test_run_name_is_a_function_of_what_the_run_computes(monkeypatch):
    name = load("--adv.attack=apgd", "--model.not_original=1", "--data.augmentations=1").run_name
    assert name.startswith("convnext_tiny_cvst_apgd2_Linf_0.01569_heavy_100ep_160px_seed0_batch512_")
    same = [
        *("--data.num_workers=9", "--logging.log_level=2", "--misc.notes=hi"),
        *("--data.train_dataset=/scratch/7/images/", "--data.val_dataset=other", "--validation.freq=3"),
        *("--lr.lr=0.001", "--adv.norm=Linf", "--adv.eps=4/255", "--training.grad_accum=1"),
        *("--adv.alpha=0.5", "--training.momentum=0.5", "--model.ema_decay=0.5", "--lr.step_length=5"),  # idle ones
    ]
    assert {load(f).run_name for f in same} == {load().run_name}
    other = [
        *("--lr.lr=2", "--training.weight_decay=0.1", "--model.ckpt_path=x", "--data.flip=0", "--adv.attack=fgsm"),
        *("--training.grad_accum=2", "--training.batch_size=256", "--training.precision=fp32", "--data.seed=1"),
    ]
    assert len({load(f).run_name for f in [*other, "--misc.notes="]}) == len(other) + 1
    assert load("--model.ckpt_path=runs/a/").run_name == load("--model.ckpt_path=runs/a").run_name
    assert "/" not in load("--logging.addendum=../../x").run_name
    two = ("--training.distributed=1", "--dist.world_size=2")
    assert load(*two).global_batch == 1024 and load(*two, "--training.batch_size=256").global_batch == 512
    assert load(*two).run_name == load("--training.grad_accum=2").run_name != load().run_name
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert load().run_name == load(*two).run_name


def test_precision_that_was_not_given_is_fp32_on_a_cpu():
    def precisions(config):
        return config.training.precision, config.validation.precision

    assert precisions(load()) == precisions(load().on("cuda")) == ("fp16", "fp16")
    assert precisions(load().on("cpu")) == ("fp32", "fp32")
    assert precisions(load("--training.precision=fp16").on("cpu")) == ("fp16", "fp32")
    assert load().run_name == load().on("cpu").run_name == load("--training.precision=fp16").run_name


def test_harmless_flags_are_flags():
    uncounted = load("--adv.attack=apgd").uncounted()
    assert {"data.num_workers", "logging.folder", "misc.notes"} <= uncounted
    assert not {"lr.lr", "adv.eps", "data.seed"} & uncounted


def test_help_ends_with_0_and_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "--model.arch" in out and "--adv.eps_warmup_epochs" in out


def eval_config(*flags):
    return load_config(EvalConfig, ["--eval.model_in=w.pt", "--data.val_dataset=digits", *flags])


def test_eval_eps_by_norm():
    assert eval_config("--eval.norms=Linf,L2,L1").eval.eps == (4 / 255, 2.0, 75.0)
    assert eval_config("--eval.norms=L2, L1", "--eval.eps=1/2,12").eval.eps == (0.5, 12.0)


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--eval.norms=Linf,L3"], ["eval.norms", "Linf, L2, L1", "L3"]),
        (["--eval.norms=L2,L2"], ["eval.norms", "once"]),
        (["--eval.norms=Linf,L2", "--eval.eps=1/255"], ["eval.eps", "one radius for each"]),
        (["--eval.eps=8"], ["eval.eps", "8/255"]),
        (["--eval.eps=0"], ["eval.eps", "above 0"]),
    ],
)
def test_eval_refused(flags, words):
    with pytest.raises(UserError) as error:
        eval_config(*flags)
    assert all(word in str(error.value) for word in words), str(error.value)
