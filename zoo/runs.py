"""A trained network from its weights file or run folder, with the flags it was trained with."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from common.errors import UserError, blame
from common.files import read_json
from common.provenance import PROVENANCE_KEY
from data.transforms import INTERPOLATIONS
from utils_architecture import TIMM_PREFIX
from zoo.description import (
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

EPOCH_FILE = re.compile(r"(weights|weights_ema)_(\d+)\.pt")  # of a run folder
HUB_FILES = (EXPORTED, "pytorch_model.bin")  # of a folder of the Hugging Face Hub


@dataclass(frozen=True)
class TrainedModel:
    """A network in eval mode on the CPU, and where it comes from."""

    model: nn.Module
    path: Path  # the weights file
    sha256: str  # of its content
    description: dict[str, Any]  # the values of `DESCRIPTION` it was built with; `weights_key` where it was asked for
    class_names: list[str] | None  # of its outputs, in order; None where the run does not say
    preprocessing: Preprocessing = Preprocessing()  # what its images went through in validation
    run: RunFacts = RunFacts()  # what its run says of it
    notes: tuple[str, ...] = ()  # sentences for the user


def load_trained(model_in: str | Path, asked: NetworkDescription) -> TrainedModel:
    """Build the network of a weights file and load it strictly.

    Args:
        model_in: weights file, or run folder (see `find_weights`).
        asked: what the flags say; unset values come from the params.json beside the file, else from the weights
            (blurpool leaves no trace in them: without).

    Raises:
        UserError: no such file, a broken params.json, or weights that do not fit the description.
    """
    path = find_weights(Path(model_in))
    run, of_timm = _run_params(path.parent), _timm_config(path)
    description = {"arch": of_timm.get("architecture")}
    for name, (section, _) in DESCRIPTION.items():
        value = getattr(asked, name)
        description[name] = run.get(section, {}).get(name, description.get(name)) if value is None else value
    weights = read_weights(path, key=asked.weights_key)
    if weights.normalizer is None and asked.add_normalization is not False:
        weights = replace(weights, normalizer=_normalizer(of_timm))
    by = "the flags, or the params.json beside the file" if run else "the flags"
    found = check_description(weights, description, source=path, by=by)
    description = {name: getattr(found, name) if value is None else value for name, value in description.items()}
    notes = ()
    says = weights.normalizer or run or of_timm or description["arch"].startswith(ROBUSTBENCH_PREFIX)
    if not says and asked.add_normalization is None:
        # Many publish weights of a network that stood behind a normaliser, of which they show nothing.
        notes = (
            f"{path} holds no input normaliser, so the network gets images as they are, in [0, 1]; if it was trained behind one, "
            "ask for it with add_normalization",
        )
    model = build_model(**description, global_pool=found.global_pool)
    with blame(str(path)):
        add_operators(model.model if has_normalizer(model) else model, weights.network)
    load_weights(model, weights, source=path)
    description |= {"weights_key": asked.weights_key} if asked.weights_key is not None else {}
    return TrainedModel(
        model=model.eval(),
        path=path,
        sha256=weights.sha256,
        description=description,
        class_names=run.get(PROVENANCE_KEY, {}).get("classes"),
        preprocessing=_preprocessing(run, of_timm, description["arch"], found.img_size),
        run=_run_facts(path, run),
        notes=notes,
    )


def find_weights(path: Path) -> Path:
    """The file itself, or the newest weights of a run folder: the moving average, unless the raw weights validated better."""
    if not path.is_dir():
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
        f"expected a weights file or run folder, got {path} without weights_<epoch>.pt or {EXPORTED} in it."
    )


def _average_is_worse(folder: Path, number: int) -> bool:
    """Whether a run's validation of that epoch says so, by robust accuracy where it was measured."""
    epoch = _epoch(folder, number)
    key = "adv_top1" if "adv_top1" in epoch else "top1"
    ema, raw = epoch.get(f"ema_{key}"), epoch.get(key)
    return isinstance(ema, float) and isinstance(raw, float) and ema < raw


def _epoch(folder: Path, number: int) -> dict[str, Any]:
    """What a run's log says of an epoch; empty where it does not."""
    found = {}
    with suppress(OSError, ValueError, AttributeError):
        for line in (folder / "log").read_text().splitlines():
            record = json.loads(line)
            found |= record if record.get("epoch") == number else {}
    return found


def _timm_config(path: Path) -> dict[str, Any]:
    """What timm, or an export, says in config.json of the weights beside it, with the architecture as `model.arch`; else empty."""
    content = (path.name in HUB_FILES and read_json(path.parent / "config.json")) or {}
    cfg = content.get("pretrained_cfg", content)
    if not isinstance(cfg, dict) or "input_size" not in cfg:
        return {}
    architecture = str(content.get("architecture"))
    return cfg | {"architecture": TIMM_PREFIX + architecture if timm.is_model(architecture) else None}


def _normalizer(cfg: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """What images are normalised with according to timm's configuration; None: with nothing."""
    mean, std = (
        torch.tensor(cfg.get(name, value)).view(1, 3, 1, 1) for name, value in (("mean", [0.0] * 3), ("std", [1.0] * 3))
    )
    return None if (mean == 0).all() and (std == 1).all() else {"mean": mean, "std": std}


def _preprocessing(run: Mapping[str, Any], cfg: Mapping[str, Any], arch: str, positions: int | None) -> Preprocessing:
    """Of the run or the export beside the weights; else timm's for its architectures; else what the position embeddings are for."""
    validation, source = run.get("validation", {}), "config.json beside the weights"
    with suppress(KeyError, TypeError, ValueError):
        resolution, crop_pct = int(validation["resolution"]), float(validation["crop_pct"])
        return Preprocessing(resolution, crop_pct, source="the run's params.json")
    known = None if cfg or not arch.startswith(TIMM_PREFIX) else timm.get_pretrained_cfg(arch.removeprefix(TIMM_PREFIX))
    if known is not None:
        cfg, source = known.to_dict(), "timm's pretrained_cfg"
        cfg |= {"input_size": [positions]} if positions else {}
    if not cfg:
        return Preprocessing(positions, source="the position embeddings") if positions else Preprocessing()
    interpolation = cfg.get("interpolation", "bicubic")
    return Preprocessing(
        int(cfg["input_size"][-1]),
        float(cfg.get("crop_pct", 0.875)),
        interpolation if interpolation in INTERPOLATIONS else "bicubic",
        "squash" if cfg.get("crop_mode") == "squash" else "center",
        source,
    )


def _run_facts(path: Path, run: Mapping[str, Any]) -> RunFacts:
    """Threat model of a run's params.json, and what its log says of the epoch whose weights these are."""
    adv, facts = run.get("adv", {}), RunFacts()
    if match := EPOCH_FILE.fullmatch(path.name):
        kind, number = match[1], int(match[2])
        clean = _epoch(path.parent, number).get("ema_top1" if kind == "weights_ema" else "top1")
        better = kind == "weights" and _average_is_worse(path.parent, number)
        facts = RunFacts(clean_acc=clean if isinstance(clean, (int, float)) else None, beats_average=better)
    known = isinstance(adv, dict) and adv.get("attack", "none") != "none" and isinstance(adv.get("eps"), (int, float))
    return replace(facts, norm=adv["norm"], eps=adv["eps"]) if known and "norm" in adv else facts


def _run_params(folder: Path) -> Mapping[str, Any]:
    """Sections → flags of the run, or of an export, that the folder holds; none of them elsewhere."""
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
