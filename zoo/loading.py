"""Weights of any layout, strictly into the model that was asked for: every name and shape fits, or nothing is loaded.

Files hold a bare state dict or one inside a training state. Wrappers leave prefixes (`module.` of DDP, `base_model.` of attack
wrappers, `_orig_mod.` of torch.compile), and a model with its input normaliser inside is `normalize.*` and `model.*`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from common.errors import UserError

WRAPPERS = ("module.", "base_model.", "_orig_mod.")
# Keys under which training states keep the model.
CONTAINERS = ("state_dict", "model_state_dict", "model")
NORMALIZER = ("normalize.mean", "normalize.std")
SHOWN_NAMES = 5


@dataclass(frozen=True)
class Weights:
    """Parameters and buffers of a bare network (no normaliser, no prefixes), and the normaliser's two buffers if it had one."""

    network: dict[str, Tensor]
    normalizer: dict[str, Tensor] | None


def read_weights(path: str | Path, *, flag: str) -> Weights:
    """Read a weights file (`torch.save`, tensors and plain values only, or safetensors) on the CPU.

    Args:
        path: the file.
        flag: name of the flag it came from, for the error.

    Raises:
        UserError: no such file, not a weights file, or no state dict in it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{flag}: expected a file of weights, got {str(path)!r}, which {_what_is(path)}.")
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the readers raise nearly anything: struct.error, IndexError, …
        reason = type(error).__name__
        raise UserError(
            f"{flag}: {path} cannot be read as weights (torch.save with tensors and plain values only, or safetensors): {reason}"
        ) from error
    weights = _bare(_state_dict(content, flag, path))
    for name, value in (weights.normalizer or {}).items():
        if value.shape != (1, 3, 1, 1):
            raise UserError(f"{flag}: {path}: normalize.{name} is {list(value.shape)}, expected [1, 3, 1, 1].")
    return weights


def load_weights(model: nn.Module, weights: Weights, *, flag: str, source: str | Path) -> None:
    """Copy `weights` into `model`, which may be a network or `normalize_model(network)`.

    A file without a normaliser fits both (the network's weights are the same). A file with one needs a model with one: its
    network was trained behind it. Nothing is copied unless everything fits.

    Args:
        model: receives the weights.
        weights: from `read_weights`.
        flag: name of the flag, for the error.
        source: the file, for the error.

    Raises:
        UserError: missing or unexpected names, other shapes, or a normaliser the model lacks; the first names are listed.
    """
    normalized = has_normalizer(model)
    if weights.normalizer is not None and not normalized:
        raise UserError(
            f"{flag}: {source} holds an input normaliser (normalize.mean, normalize.std), the model has none; "
            "give --model.add_normalization=1."
        )
    network = model.model if normalized else model
    expected = network.state_dict()
    problems = _differences(expected, weights.network)
    if problems:
        more = f" and {len(problems) - SHOWN_NAMES} more" if len(problems) > SHOWN_NAMES else ""
        raise UserError(
            f"{flag}: {source} does not fit the model ({len(expected)} tensors expected, {len(weights.network)} found): "
            f"{'; '.join(problems[:SHOWN_NAMES])}{more}. Do model.arch, model.not_original, model.updated and model.num_classes "
            "describe this checkpoint?"
        )
    network.load_state_dict(weights.network)
    if weights.normalizer is not None:
        model.normalize.load_state_dict(weights.normalizer)


def has_normalizer(model: nn.Module) -> bool:
    """Whether `model` was made by `utils_architecture.normalize_model`."""
    children = [name for name, _ in model.named_children()]
    return children == ["normalize", "model"]


def _what_is(path: Path) -> str:
    return "is a folder" if path.is_dir() else "does not exist"


def _state_dict(content: Any, flag: str, path: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        if content and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
            return dict(content)
        inner = [content[key] for key in CONTAINERS if isinstance(content.get(key), Mapping)]
        if not inner:
            break
        content = inner[0]
    shown = (
        f"a mapping with keys {', '.join(map(str, list(content)[:5]))}"
        if isinstance(content, Mapping)
        else type(content).__name__
    )
    raise UserError(
        f"{flag}: {path} holds no state dict (names and tensors, maybe under {', '.join(CONTAINERS)}); got {shown}."
    )


def _bare(state: dict[str, Tensor]) -> Weights:
    normalizer = None
    while True:
        prefix = next((p for p in (*WRAPPERS, "model.") if state and all(name.startswith(p) for name in state)), None)
        if prefix is not None:
            state = {name.removeprefix(prefix): value for name, value in state.items()}
        elif normalizer is None and all(name in state for name in NORMALIZER):
            normalizer = {name.removeprefix("normalize."): state[name] for name in NORMALIZER}
            state = {name: value for name, value in state.items() if name not in NORMALIZER}
        else:
            return Weights(network=state, normalizer=normalizer)


def _differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """One phrase a name that is missing, unexpected, or of another shape, in the model's order."""
    problems = []
    for name, value in expected.items():
        if name not in found:
            problems.append(f"{name} is missing")
        elif found[name].shape != value.shape:
            problems.append(f"{name} is {list(found[name].shape)} instead of {list(value.shape)}")
    return problems + [f"{name} is unexpected" for name in found if name not in expected]
