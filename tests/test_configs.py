"""Published runs and ablations in configs/: files, headers and the commands in the headers."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from attacks.registry import forward_equivalents
from common.flags import config_to_dict, load_config
from evaluation.config import EvalConfig
from training.config import TrainConfig
from utils_architecture import ARCHITECTURES
from zoo.models import build_model

PROJECT = Path(__file__).resolve().parent.parent
CONFIGS = PROJECT / "configs"
STATE_DICTS = json.loads((PROJECT / "tests/golden/state_dicts.json").read_text())

# Names relative to configs/, without the suffix. Other tests cover the demo, own_…, grids and claims.
ALL = sorted(
    str(path.relative_to(CONFIGS).with_suffix(""))
    for path in CONFIGS.rglob("*.yaml")
    if not path.name.startswith(("demo_", "own_", "grid_", "claims_"))
)
DATA = ["--data.train_dataset=train", "--data.val_dataset=val", "--data.num_workers=12", "--data.in_memory=0"]
IMAGENET_IMAGES = 1_281_167  # of the training set
GPUS = 8  # assumed by the costs in the headers


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the published table; accuracies in percent, None if not published."""

    arch: str
    conv_stem: bool
    epochs: int | None
    clean: str | None
    aa: str | None
    token: str
    normalizer: bool | None = None  # of the released weights, None if not known
    eps: float = 4 / 255
    higher: tuple[int, str, str] | None = None  # evaluated at another image size: pixels, clean, AutoAttack


PUBLISHED = {
    "convnext_iso_cvst": Row("convnext_iso", True, 300, "70.2", "45.9", "HpNbkLTNTBiaeo8", False),
    "vit_s": Row("deit_s", False, 300, "69.2", "44.0", "XLLnoCnJxp74Zqn"),
    "vit_s_cvst": Row("deit_s", True, 300, "72.5", "48.1", "agtDw3D7QXbDCmw", True),
    "convnext_tiny": Row("convnext_tiny", False, 300, "72.4", "48.6", "XLLnoCnJxp74Zqn"),
    "convnext_tiny_cvst": Row("convnext_tiny", True, 300, "72.7", "49.5", "BFLoMrMdn8iBk7Y", False),
    "vit_m_cvst": Row("vit_m", True, 50, "72.4", "48.8", "q2mkEYtq5Zjpa4e"),
    "convnext_small_cvst": Row("convnext_small", True, 50, "74.4", "52.4", "m3bAwNg4CJY4jrp", False),
    "vit_b": Row("vit_b", False, 50, "73.3", "50.0", "XLLnoCnJxp74Zqn"),
    "convnext_base": Row("convnext_base", False, 50, "75.6", "54.3", "XLLnoCnJxp74Zqn"),
    "vit_b_cvst": Row("vit_b", True, 250, "76.3", "54.7", "SbN5AJAicdZJXyr", False),
    "convnext_base_cvst": Row(
        "convnext_base", True, 250, "75.9", "56.1", "RQBEXagC7R7XweX", False, higher=(256, "76.9", "57.3")
    ),
    "convnext_large_cvst": Row(
        "convnext_large", True, 100, "77.0", "57.7", "YzBpeHRrRQzHBDz", False, higher=(320, "78.2", "59.4")
    ),
    "convnext_base_cvst_ft8": Row("convnext_base", True, None, None, None, "FiTToeo4RKY896P", False, eps=8 / 255),
}
CLEAN = {f"clean/{name}": name for name in PUBLISHED if not name.endswith("_ft8")}  # → the run that starts from it
ABLATIONS = [name for name in ALL if name.startswith("ablations/")]

# Flags that every file states, so that published runs do not depend on defaults of the project.
STATED = {
    "model": {"arch", "not_original", "add_normalization", "pretrained", "num_classes", "model_ema"},
    "resolution": {"min_res", "max_res"},
    "data": {"seed", "augmentations", "min_scale", "flip"},
    "lr": {"lr", "lr_schedule_type", "lr_peak_epoch"},
    "training": {"epochs", "batch_size", "global_batch", "optimizer", "weight_decay", "label_smoothing", "precision"},
    "validation": {"resolution", "crop_pct", "batch_size", "precision"},
    "adv": {"attack", "norm", "eps"},
    "logging": {"log_level", "save_freq"},
    "misc": {"use_channel_last"},
}
# Optimisation and data of the published launcher, the same for all models.
RECIPE = {
    "data.seed": 0,
    "data.augmentations": 1,
    "lr.lr_schedule_type": "cosine",
    "training.batch_size": 80,
    "training.global_batch": 640,
    "training.optimizer": "adamw",
    "training.weight_decay": 0.05,
    "training.label_smoothing": 0.1,
    "training.precision": "fp16",
    "model.model_ema": True,
    "model.ema_decay": 0.9999,
    "model.num_classes": 1000,
    "misc.use_channel_last": True,
    "validation.resolution": 224,
    "resolution.min_res": 224,
    "resolution.max_res": 224,
}
# The published flags, with "…" for values of the user (here for 8 GPUs). Some flags have "=", some not, one occurs twice.
PUBLISHED_LAUNCHER = (
    "--data.num_workers=12 --data.in_memory=1 --data.train_dataset=… --data.val_dataset=… --logging.folder=… "
    "--logging.log_level 2 --adv.attack apgd --adv.n_iter 2 --adv.norm Linf --training.distributed 1 "
    "--training.batch_size 80 --lr.lr 1e-3 --logging.save_freq 2 --resolution.min_res 224 --resolution.max_res 224 "
    "--data.seed 0 --data.augmentations 1 --model.add_normalization 0 --model.not_original 1 --model.model_ema 1 "
    "--lr.lr_peak_epoch 20 --training.label_smoothing 0.1 --logging.addendum=… --dist.world_size 8 "
    "--training.distributed 1 --model.pretrained 0 --model.arch convnext_base --training.epochs 300"
)


# ------------------------------------------------------------------------------------------------------ reading
@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run from the project's root: paths in the commands are relative to it."""
    monkeypatch.chdir(PROJECT)


@functools.cache
def load(name: str, *flags: str) -> TrainConfig:
    return load_config(TrainConfig, ["--config-file", str(CONFIGS / f"{name}.yaml"), *DATA, *flags])


def flat(config: TrainConfig) -> dict[str, Any]:
    return {f"{s}.{flag}": value for s, flags in config_to_dict(config).items() for flag, value in flags.items()}


def header(name: str) -> dict[str, str]:
    """Return the fields of a file's header (`# Field: …`, continued on indented lines); "" is its title."""
    fields, field = {"": ""}, ""
    for line in (CONFIGS / f"{name}.yaml").read_text().splitlines():
        if not line.startswith("#"):
            break
        if start := re.match(r"# ([A-Z][A-Za-z ]*):(?: |$)", line):
            field, line = start[1], line[start.end() :]
        separator = "\n" if field in fields else ""
        fields[field] = fields.get(field, "") + separator + line.removeprefix("#").strip()
    return fields


def arguments(command: str, launcher: str) -> list[str]:
    """Return the arguments of `bash <launcher> …`, with placeholders replaced."""
    words = shlex.split(command.replace("…", "filled"))
    assert words[:2] == ["bash", launcher], command
    return words[2:]


def commands(text: str) -> list[str]:
    return [line[line.index("bash run_") :] for line in text.splitlines() if "bash run_" in line]


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Build models on the meta device: names and shapes without values."""
    # timm reads the values of a linspace while building (drop path rates).
    monkeypatch.setattr(torch, "linspace", functools.partial(torch.linspace, device="cpu"))
    with torch.device("meta"):
        yield


def built(config: TrainConfig) -> nn.Module:
    """Return the network of a run, without trained weights."""
    m = config.model
    return build_model(
        m.arch, not_original=m.not_original, num_classes=m.num_classes, add_normalization=m.add_normalization
    )


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


# ------------------------------------------------------------------------------------------------------- files
def test_each_published_run_and_each_clean_start_has_one_file() -> None:
    assert set(ALL) == {*PUBLISHED, *CLEAN, *ABLATIONS}
    assert len(PUBLISHED) == 13 and len(CLEAN) == 12 and ABLATIONS


@pytest.mark.parametrize("name", ALL)
def test_file_states_the_recipe_and_leaves_machine_and_paths_to_the_command(name: str) -> None:
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert content.keys() == STATED.keys()
    for section, flags in STATED.items():
        assert flags <= content[section].keys(), section
    assert content["data"].keys() == STATED["data"]
    assert "ckpt_path" not in content["model"]


def test_run_names_differ() -> None:
    # Random initialisation is the absence of a flag: its file has the same flags as its baseline.
    names = {load(name).run_name for name in ALL if not name.endswith("_random_init")}
    assert len(names) == sum(not name.endswith("_random_init") for name in ALL)


# ---------------------------------------------------------------------------------------------- published runs
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_run(name: str) -> None:
    row, config = PUBLISHED[name], load(name)
    assert (config.model.arch, config.model.not_original) == (row.arch, row.conv_stem)
    assert (config.adv.attack, config.adv.norm, config.adv.n_iter) == ("apgd", "Linf", 2)
    assert config.adv.eps == pytest.approx(row.eps, rel=1e-12)
    assert flat(config).items() >= RECIPE.items()
    assert config.model.pretrained is False  # starts from model.ckpt_path
    if row.epochs is not None:
        assert (config.training.epochs, config.lr.lr) == (row.epochs, 1e-3)
        assert config.lr.lr_peak_epoch == (20 if row.epochs > 100 else 10)
    if row.normalizer is not None:
        assert config.model.add_normalization == row.normalizer


@pytest.mark.parametrize("name", PUBLISHED)
def test_header_of_a_published_run_has_its_figures(name: str) -> None:
    row, fields = PUBLISHED[name], header(name)
    text = fields["Paper row"]
    assert f"https://nc.mlcloud.uni-tuebingen.de/index.php/s/{row.token}" in text
    if row.clean is not None:
        assert f"{row.epochs} epochs, {row.clean} % clean / {row.aa} % AutoAttack (Linf 4/255) at 224 px" in text
    if row.higher is not None:
        px, clean, aa = row.higher
        assert f"{clean} / {aa} at {px} px" in text and f"--eval.img_size={px}" in fields["Evaluation"]
    if row.clean is None:
        assert "the project's own" in fields[""]


def test_stems_of_a_pair_differ_in_nothing_else() -> None:
    for name in ("vit_s", "convnext_tiny"):
        assert load(f"{name}_cvst", "--model.not_original=0") == load(name)


def test_published_launcher_is_accepted_and_equals_the_file_of_its_model() -> None:
    config = load_config(TrainConfig, PUBLISHED_LAUNCHER.replace("…", "filled").split())
    # The published model was trained for 250 epochs; the launcher has 300. Only paths of data and runs and the number of
    # processes may differ.
    launched, filed = flat(config), flat(load("convnext_base_cvst", "--training.epochs=300"))
    differing = {flag for flag in launched if launched[flag] != filed[flag]}
    assert differing == {
        "data.train_dataset",
        "data.val_dataset",
        "data.in_memory",
        "logging.folder",
        "logging.addendum",
        "training.distributed",
        "training.global_batch",
        "dist.world_size",
    }


# ------------------------------------------------------------------------------------------------ clean starts
@pytest.mark.parametrize("name", CLEAN)
@pytest.mark.usefixtures("meta")
def test_weights_of_clean_training_fit_the_run_that_starts_from_them(name: str) -> None:
    clean, robust = load(name), load(CLEAN[name])
    assert clean.adv.attack == "none"
    assert flat(clean).items() >= RECIPE.items()
    assert clean.model.add_normalization == robust.model.add_normalization
    assert shapes(built(clean)) == shapes(built(robust))
    # Published weights are used if there are any.
    assert clean.model.pretrained == ARCHITECTURES[clean.model.arch].pretrained
    assert "the project's own" in header(name)[""]


@pytest.mark.usefixtures("meta")
def test_vit_s_starts_from_deit_s_and_fits_what_was_released_as_vit_s() -> None:
    for name in ("vit_s", "vit_s_cvst"):
        start = ARCHITECTURES[load(f"clean/{name}").model.arch]
        assert start.builder == "deit_small_patch16_224.fb_in1k"
        assert "issue 8" in header(f"clean/{name}")["Choices"] and "issue 8" in header(name)["Choices"]
        assert shapes(built(load(name))) == shapes(built(load(name, "--model.arch=vit_s")))


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.usefixtures("meta")
def test_network_of_a_published_run_has_the_published_names(name: str) -> None:
    model = built(load(name))
    row = PUBLISHED[name]
    published = STATE_DICTS[f"{row.arch}/not_original={int(row.conv_stem)}"]
    network = model.model if load(name).model.add_normalization else model
    assert shapes(network) == {key: tuple(shape) for key, shape in published["state_dict"].items()}


@pytest.mark.parametrize("name", [n for n in ALL if n not in CLEAN])
def test_start_in_the_header_is_the_last_ema_of_a_fitting_run(name: str) -> None:
    starts = re.findall(r"(weights_ema_(\d+)\.pt) of a run of configs/(\S+?)\.yaml", header(name)["Command"])
    if name.endswith("_random_init"):
        assert not starts
        return
    ((_, epoch, start),) = starts
    config, before = load(name), load(start)
    assert int(epoch) == before.training.epochs
    for flag in ("arch", "not_original", "add_normalization", "num_classes"):
        assert getattr(config.model, flag) == getattr(before.model, flag), flag


# --------------------------------------------------------------------------------------------------- ablations
# Flags in which an ablation differs from its baseline of 50 epochs.
FACTORS = {
    "50ep": {},
    "patchstem": {"model.not_original": False},
    "basic_aug": {"data.augmentations": 0},
    "random_init": {},
    "no_ema": {"model.model_ema": False},
    "apgd1": {"adv.n_iter": 1},
    "apgd3": {"adv.n_iter": 3},
    "fgsm": {"adv.attack": "fgsm"},
}


def split_ablation(name: str) -> tuple[str, str]:
    """Split `ablations/<run>_<factor>` into the published run and the factor."""
    run, factor = re.fullmatch(rf"ablations/(.+?)_({'|'.join(FACTORS)})", name).groups()
    return run, factor


def test_ablations_are_of_the_two_small_models() -> None:
    assert {split_ablation(name)[0] for name in ABLATIONS} == {"convnext_tiny_cvst", "vit_s_cvst"}
    assert {split_ablation(name)[1] for name in ABLATIONS} == FACTORS.keys()


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_differs_in_its_factor_alone(name: str) -> None:
    run, factor = split_ablation(name)
    config, published, compared = flat(load(name)), flat(load(run)), flat(load(f"ablations/{run}_50ep"))
    assert {flag: value for flag, value in config.items() if value != compared[flag]} == FACTORS[factor]
    shorter = {"training.epochs": 50, "lr.lr_peak_epoch": 10}
    assert {flag: value for flag, value in compared.items() if value != published[flag]} == shorter


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_runs_by_flags_alone(name: str) -> None:
    (own,), (by_flags,) = commands(header(name)["Command"]), commands(header(name)["Equivalent command"])
    run, factor = split_ablation(name)
    given = arguments(by_flags, "run_train.sh")
    assert given[:2] == ["--config-file", f"configs/{run}.yaml"]
    assert load_config(TrainConfig, given) == load_config(TrainConfig, arguments(own, "run_train.sh"))
    assert any(flag.startswith("--model.ckpt_path=") for flag in given) == (factor != "random_init")


# ----------------------------------------------------------------------------------------------------- headers
@pytest.mark.parametrize("name", ALL)
def test_header_is_complete(name: str) -> None:
    fields = header(name)
    assert fields[""], "a title"
    for field in ("Paper row", "Command", "Cost", "Result"):
        assert fields.get(field), field
    assert fields["Result"].startswith("not run.")


@pytest.mark.parametrize("name", ALL)
def test_command_in_the_header_runs_this_file(name: str) -> None:
    (command,) = commands(header(name)["Command"])
    given = arguments(command, "run_train.sh")
    assert given[:2] == ["--config-file", f"configs/{name}.yaml"]
    config = load_config(TrainConfig, given)
    assert (config.data.train_dataset, config.data.val_dataset) == ("filled", "filled")
    assert bool(config.model.ckpt_path) == (name not in CLEAN and not name.endswith("_random_init"))


@pytest.mark.parametrize("name", [n for n in ALL if n not in CLEAN])
def test_evaluation_in_the_header_is_of_the_radius_trained_for(name: str) -> None:
    (command,) = commands(header(name)["Evaluation"])
    config = load_config(EvalConfig, arguments(command, "run_eval.sh"))
    assert config.eval.norms == ("Linf",) and config.eval.fullaa
    assert config.eval.eps == pytest.approx((load(name).adv.eps,), rel=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_cost_in_the_header_follows_from_the_file(name: str) -> None:
    config, text = load(name), header(name)["Cost"]
    batch = GPUS * config.training.batch_size * config.training.grad_accum
    assert batch == config.training.global_batch
    forwards, epochs = forward_equivalents(config.adv), config.training.epochs
    assert f"{epochs} epochs × {IMAGENET_IMAGES:,} images" in text
    assert f"{epochs * (IMAGENET_IMAGES // batch):,} steps of {batch} ({GPUS} GPUs × 80" in text
    assert f"{forwards} forward-equivalents per step" in text
    assert f"{epochs * IMAGENET_IMAGES * forwards / 1e9:.2f} billion image forwards" in text
    assert "Time: not measured." in text
