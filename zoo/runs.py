"""Loading of a trained network from its weights file or run folder, with the flags of its training."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from common.errors import UserError, blame
from common.files import read_json
from common.provenance import PROVENANCE_KEY
from data.transforms import INTERPOLATIONS
from utils_architecture import IMAGENET_MEAN, IMAGENET_STD, TIMM_PREFIX
from zoo.description import (
    ASKED_ONLY,
    DESCRIPTION,
    EXPORT_KEY,
    EXPORTED,
    ROBUSTBENCH_PREFIX,
    NetworkDescription,
    Preprocessing,
    RunFacts,
)
from zoo.inference import check_description
from zoo.loading import has_normalizer, load_weights, read_weights
from zoo.meansparse import add_operators
from zoo.models import build_model
from zoo.reading import three_numbers

EPOCH_FILE = re.compile(r"(weights|weights_ema)_(\d+)\.pt")  # in a run folder
TIMM_DEFAULTS = {"input_size": [3, 224, 224], "mean": IMAGENET_MEAN, "std": IMAGENET_STD}  # for missing keys
HUB_FILES = (EXPORTED, "pytorch_model.bin")  # in a folder of the Hugging Face Hub


@dataclass(frozen=True)
class TrainedModel:
    """A network in eval mode on the CPU, and its origin."""

    model: nn.Module
    path: Path  # the weights file
    sha256: str  # of the weights file
    description: dict[str, Any]  # values of `DESCRIPTION` it was built with, and requested values of `ASKED_ONLY`
    class_names: list[str] | None  # of its outputs, in order; None: unknown
    preprocessing: Preprocessing = Preprocessing()  # of its images in validation
    run: RunFacts = RunFacts()  # recorded by its run
    notes: tuple[str, ...] = ()  # sentences for the user
    sure_of_input: bool = (
        True  # whether the weights or their run define the normalisation of images, not another file in the folder
    )


def load_trained(model_in: str | Path, asked: NetworkDescription) -> TrainedModel:
    """Build the network of a weights file and load it strictly.

    Args:
        model_in: weights file, or run folder (see `find_weights`).
        asked: values of the flags; unset ones come from params.json next to the file, else from the weights
            (they do not show blurpool: default without).

    Raises:
        UserError: the file does not exist, params.json is damaged, or the weights do not fit the description.
    """
    path = find_weights(Path(model_in))
    run, weights = _run_params(path.parent), read_weights(path, key=asked.weights_key)
    of_timm = _timm_config(path) or _timm_arguments(weights.arguments)
    description = {"arch": of_timm.get("architecture")}
    for name, (section, _) in DESCRIPTION.items():
        value = getattr(asked, name)
        description[name] = run.get(section, {}).get(name, description.get(name)) if value is None else value
    if asked.mean is not None and (weights.normalizer is not None or asked.add_normalization is False):
        why = "the file has a normaliser" if weights.normalizer is not None else "add_normalization=0 requests none"
        raise UserError(f"{path}: mean and std would have no effect, because {why}; remove one of them.")
    sure = bool(weights.normalizer or (run and asked.add_normalization is None))
    with blame(f"normaliser of {path}"):
        if weights.normalizer is None and asked.add_normalization is not False:
            weights = replace(weights, normalizer=_normalizer(_own_normalizer(asked) or of_timm))
    by = "the flags, or params.json next to the file" if run else "the flags"
    found = check_description(weights, description, source=path, by=by)
    description = {name: getattr(found, name) if value is None else value for name, value in description.items()}
    facts, notes = _run_facts(path, run), ()
    if facts.worse_than_raw:
        notes = (f"{path}: the raw weights of the same epoch had a better validation than these EMA weights",)
    sure = sure or description["arch"].startswith(ROBUSTBENCH_PREFIX)
    says = weights.normalizer or sure or of_timm
    if not says and asked.add_normalization is None:
        # Many published weights need a normaliser that is not in the file.
        notes += (
            f"{path} contains no input normaliser, so the network gets images without normalisation, in [0, 1]; if it was trained "
            "with one, give add_normalization=1",
        )
    # Position embeddings are not resampled to another grid, because resampling back would not restore them.
    model = build_model(**description, global_pool=found.global_pool, img_size=found.img_size)
    with blame(str(path)):
        add_operators(model.model if has_normalizer(model) else model, weights.network)
    load_weights(model, weights, source=path)
    description |= {name: value for name in ASKED_ONLY if (value := getattr(asked, name)) is not None}
    return TrainedModel(
        model=model.eval(),
        path=path,
        sha256=weights.sha256,
        description=description,
        class_names=_class_names(run) or of_timm.get("classes"),
        preprocessing=_preprocessing(run, of_timm, description["arch"], found.img_size),
        run=facts,
        notes=notes,
        sure_of_input=sure,
    )


def recorded_classes(model_in: str) -> list[str] | None:
    """Return the output names of a weights file or run folder, in order; None if neither run nor config.json has them."""
    with suppress(UserError):
        if os.path.exists(path := Path(model_in).expanduser()):
            path = find_weights(path)
            return _class_names(_run_params(path.parent)) or _timm_config(path).get("classes")
    return None


def recorded_input(path: Path, arguments: Mapping[str, Any]) -> tuple[dict[str, Tensor] | None, str] | None:
    """Return (`mean` and `std` of the network's normaliser, or None for no normaliser; source of this information).

    `arguments`: of the training script, from the weights file. None if neither a run nor timm's configuration defines it.
    """
    asked = _run_params(path.parent).get("model", {}).get("add_normalization")
    if asked is not None:
        pair = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} if asked else {}
        return _normalizer(pair), "the params.json next to it"
    cfg = _timm_config(path) or _timm_arguments(arguments)
    return (_normalizer(cfg), cfg.get("from", "the config.json next to it")) if cfg else None


def _class_names(run: Mapping[str, Any]) -> list[str] | None:
    names = run.get(PROVENANCE_KEY, {}).get("classes")
    return names if isinstance(names, list) else None


def find_weights(path: Path) -> Path:
    """Return the file itself, or the newest weights of a run folder: EMA, unless the raw weights had a better validation."""
    if not os.path.isdir(path):  # Path.is_dir fails for names too long
        return path
    newest: dict[str, int] = {}
    for file in path.iterdir():
        if match := EPOCH_FILE.fullmatch(file.name):
            newest[match[1]] = max(newest.get(match[1], 0), int(match[2]))
    if newest:
        epoch = newest.get("weights", 0)
        raw = "weights_ema" not in newest or (epoch == newest["weights_ema"] and _average_is_worse(path, epoch))
        name = "weights" if raw else "weights_ema"
        return path / f"{name}_{newest[name]}.pt"
    for name in HUB_FILES:
        if (path / name).is_file():
            return path / name
    raise UserError(
        f"expected a weights file or run folder, got {path.absolute()}, which contains neither weights_<epoch>.pt nor {EXPORTED}."
    )


def _average_is_worse(folder: Path, number: int) -> bool:
    """Return whether EMA is worse in a run's validation of the epoch: by robust accuracy if measured, else clean."""
    epoch = _epoch(folder, number)
    for key in ("adv_top1", "top1"):
        ema, raw = epoch.get(f"ema_{key}"), epoch.get(key)
        if all(isinstance(value, (int, float)) for value in (ema, raw)) and ema != raw:
            return raw > ema or ema != ema  # a NaN is equal to nothing
    return False


def _epoch(folder: Path, number: int) -> dict[str, Any]:
    """Return the records of an epoch in a run's log, merged; empty if there are none."""
    found = {}
    with suppress(OSError):
        for line in (folder / "log").read_text(errors="replace").splitlines():
            with suppress(ValueError, AttributeError):  # a damaged line
                record = json.loads(line)
                found |= record if record.get("epoch") == number else {}
    return found


def _timm_config(path: Path) -> dict[str, Any]:
    """Return timm's (or an export's) config.json next to the weights, with the architecture as `model.arch`; else empty."""
    content = (path.name in HUB_FILES and read_json(path.parent / "config.json")) or {}
    cfg = content.get("pretrained_cfg", content)
    if not isinstance(cfg, dict) or not TIMM_DEFAULTS.keys() & cfg.keys():
        return {}
    architecture = str(content.get("architecture"))
    options = {**(content.get("model_args") or {}), "global_pool": content.get("global_pool")}
    odd = {key: value for key, value in options.items() if value not in (None, "", "avg", "token")}
    if odd:
        raise UserError(
            f"{path.parent / 'config.json'}: expected an architecture with timm's default options, got the options {odd}."
        )
    names = content.get("label_names") or content.get("labels")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        names = None
    elif len(set(names)) < len(names):
        names = [
            name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)
        ]  # ImageNet has two cranes
    elif content.get("num_classes") not in (None, len(names)):
        raise UserError(
            f"{path.parent / 'config.json'}: expected a name for each of its {content['num_classes']} classes, but label_names has "
            f"{len(names)}."
        )
    known = {"architecture": TIMM_PREFIX + architecture if timm.is_model(architecture) else None, "classes": names}
    return TIMM_DEFAULTS | cfg | known


def _timm_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same from the arguments of timm's training script; missing values are the architecture's own."""
    name = str(arguments.get("model"))
    if not arguments or not timm.is_model(name):
        return {}
    own = timm.get_pretrained_cfg(name)
    cfg = TIMM_DEFAULTS | (own.to_dict() if own is not None else {})
    given = {key: arguments.get(key) for key in ("mean", "std", "crop_pct", "interpolation", "crop_mode", "input_size")}
    size = arguments.get("img_size")
    cfg |= {key: value for key, value in given.items() if value} | ({"input_size": [size]} if size else {})
    if (
        arguments.get("no_normalize") or arguments.get("normalize") is False
    ):  # options in forks for adversarial training
        cfg |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    return cfg | {"architecture": TIMM_PREFIX + name, "from": "timm's arguments in the file"}


def _own_normalizer(asked: NetworkDescription) -> dict[str, Any]:
    if (asked.mean is None) != (asked.std is None):
        raise UserError("mean, std: expected both or neither, got one.")
    return {} if asked.mean is None else {"mean": asked.mean, "std": asked.std}


def _normalizer(cfg: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Return mean and std of timm's configuration as tensors; None: no normalisation."""
    mean, std = (three_numbers(cfg.get(name, value)) for name, value in (("mean", [0.0] * 3), ("std", [1.0] * 3)))
    if mean is None or std is None or not (std > 0).all():
        raise UserError(f"expected mean and std of three numbers, got {cfg.get('mean')} and {cfg.get('std')}.")
    if (mean == 0).all() and (std == 1).all():
        return None
    if max(mean.max(), std.max()) > 2:  # for images in [0, 255], not in [0, 1]
        mean, std = mean / 255, std / 255
    return {"mean": mean.view(1, 3, 1, 1), "std": std.view(1, 3, 1, 1)}


def _preprocessing(run: Mapping[str, Any], cfg: Mapping[str, Any], arch: str, positions: int | None) -> Preprocessing:
    """Return the preprocessing: of run or export next to the weights, else timm's, else the size of the position embeddings."""
    validation, source = run.get("validation", {}), cfg.get("from", "config.json next to the weights")
    with suppress(KeyError, TypeError, ValueError, OverflowError):
        resolution, crop_pct = int(validation["resolution"]), float(validation["crop_pct"])
        if resolution > 0 and 0 < crop_pct <= 1:
            return Preprocessing(resolution, crop_pct, source="the run's params.json")
    known = None if cfg or not arch.startswith(TIMM_PREFIX) else timm.get_pretrained_cfg(arch.removeprefix(TIMM_PREFIX))
    if known is not None:
        cfg, source = known.to_dict(), "timm's pretrained_cfg"
        cfg |= {"input_size": [positions]} if positions else {}
    if not cfg:
        return Preprocessing(positions, source="the position embeddings") if positions else Preprocessing()
    size, crop_pct = cfg["input_size"], cfg.get("crop_pct") or 0.875
    size = size[-1] if isinstance(size, (list, tuple)) and len(set(size[-2:])) == 1 else size
    if type(size) is not int or size < 1 or not isinstance(crop_pct, (int, float)) or not 0 < crop_pct <= 1:
        raise UserError(
            f"{source}: expected square images and a crop_pct in (0, 1], got {cfg['input_size']} and {cfg.get('crop_pct')}."
        )
    interpolation, mode = cfg.get("interpolation"), cfg.get("crop_mode")
    odd = [
        value
        for value in (interpolation, mode)
        if value not in (None, "", "random", "center", "squash", "crop", *INTERPOLATIONS)
    ]
    if odd:
        source += f", instead of its {' and '.join(map(repr, odd))}"
    return Preprocessing(
        size,
        float(crop_pct),
        interpolation if interpolation in INTERPOLATIONS else "bicubic",
        mode if mode in ("squash", "crop") else "center",
        source,
    )


def _run_facts(path: Path, run: Mapping[str, Any]) -> RunFacts:
    """Return the threat model in a run's params.json and the validation of the weights' epoch in its log."""
    adv, facts = run.get("adv", {}), RunFacts()
    if match := EPOCH_FILE.fullmatch(path.name):
        kind, number = match[1], int(match[2])
        average, worse = kind == "weights_ema", _average_is_worse(path.parent, number)
        clean = _epoch(path.parent, number).get("ema_top1" if average else "top1")
        facts = RunFacts(
            clean_acc=clean if isinstance(clean, (int, float)) else None,
            beats_average=worse and not average,
            worse_than_raw=worse and average,
        )
    known = isinstance(adv, dict) and adv.get("attack", "none") != "none" and isinstance(adv.get("eps"), (int, float))
    return replace(facts, norm=adv["norm"], eps=adv["eps"]) if known and "norm" in adv else facts


def _run_params(folder: Path) -> Mapping[str, Any]:
    """Read sections → flags of the run or export in the folder; empty for other folders."""
    file = folder / "params.json"
    if (params := read_json(file)) is None:
        file = folder / "config.json"
        params = (read_json(file) or {}).get(EXPORT_KEY, {})
    sections = {section for section, _ in DESCRIPTION.values()} | {PROVENANCE_KEY}
    if not isinstance(params, dict) or not all(isinstance(params.get(section, {}), dict) for section in sections):
        raise UserError(f"{file}: expected the sections and flags of a run.")
    for name, (section, kind) in DESCRIPTION.items():
        if name in params.get(section, {}) and type(params[section][name]) is not kind:
            raise UserError(f"{file}: {section}.{name}: expected {kind.__name__}, got {params[section][name]!r}.")
    return params
