"""A trained network from its weights file or run folder, with the flags it was trained with."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from common.config import PROVENANCE_KEY, EvalModelConfig
from common.errors import UserError
from zoo.loading import load_weights, read_weights
from zoo.models import build_model

# What describes a network: field of EvalModelConfig → where a run's params.json holds it, and the default without one.
DESCRIPTION = {
    "arch": ("model", "convnext_tiny"),
    "not_original": ("model", False),
    "add_normalization": ("model", None),
    "updated": ("model", False),
    "num_classes": ("model", 1000),
    "use_blurpool": ("training", False),
}


@dataclass(frozen=True)
class TrainedModel:
    """A network in eval mode on the CPU, and where it comes from.

    Attributes:
        path: the weights file.
        description: the values of `DESCRIPTION` it was built with.
        class_names: of its outputs, in order; None where the run does not say.
    """

    model: nn.Module
    path: Path
    description: dict[str, Any]
    class_names: list[str] | None


def load_trained(model_in: str | Path, asked: EvalModelConfig, *, flag: str) -> TrainedModel:
    """Build the network of a weights file and load it strictly.

    Args:
        model_in: weights file, or run folder (then its newest weights, EMA where kept).
        asked: what the flags say; unset values come from the params.json beside the file, else from `DESCRIPTION`.
        flag: name of the flag of `model_in`, for errors.

    Raises:
        UserError: no such file, a broken params.json, or weights that do not fit the description.
    """
    path = find_weights(Path(model_in), flag=flag)
    run = _run_params(path.parent)
    description = {}
    for name, (section, default) in DESCRIPTION.items():
        value = getattr(asked, name)
        description[name] = run.get(section, {}).get(name, default) if value is None else value
    weights = read_weights(path, flag=flag)
    if description["add_normalization"] is None:
        description["add_normalization"] = weights.normalizer is not None
    model = build_model(**description)
    load_weights(model, weights, flag=flag, source=path)
    class_names = run.get(PROVENANCE_KEY, {}).get("classes")
    return TrainedModel(model=model.eval(), path=path, description=description, class_names=class_names)


def find_weights(path: Path, *, flag: str) -> Path:
    """The file itself, or the newest weights of a run folder (EMA where kept)."""
    if not path.is_dir():
        return path
    for name in ("weights_ema", "weights"):
        found = [
            (int(m.group(1)), file) for file in path.iterdir() if (m := re.fullmatch(rf"{name}_(\d+)\.pt", file.name))
        ]
        if found:
            return max(found)[1]
    raise UserError(
        f"{flag}: expected a weights file or a run folder, got the folder {path} without weights_<epoch>.pt in it."
    )


def _run_params(folder: Path) -> Mapping[str, Any]:
    file = folder / "params.json"
    if not file.is_file():
        return {}
    try:
        params = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: expected the flags of a run as JSON; {error}.") from error
    sections = {section for section, _ in DESCRIPTION.values()} | {PROVENANCE_KEY}
    if not isinstance(params, dict) or not all(isinstance(params.get(section, {}), dict) for section in sections):
        raise UserError(f"{file}: expected the sections and flags of a run.")
    for name, (section, default) in DESCRIPTION.items():
        kinds = {"add_normalization": bool}.get(name, type(default))
        if name in params.get(section, {}) and type(params[section][name]) is not kinds:
            raise UserError(f"{file}: {section}.{name}: expected {kinds.__name__}, got {params[section][name]!r}.")
    return params
