"""Weights of any layout, strictly into the model that was asked for: every name and shape fits, or nothing is loaded.

Files hold a bare state dict or training states with one inside, perhaps with its moving average. Wrappers leave prefixes
(`module.` of DDP, `base_model.` of attack wrappers, `_orig_mod.` of torch.compile), and a model with its input normaliser
inside is `normalize.*` and `model.*`. `zoo.inference` says which network a file holds.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from common.errors import UserError
from common.files import damaged_record

Which = Literal["ema", "raw"]

PREFIXES = ("module.", "base_model.", "_orig_mod.", "model.")
# Keys under which training states keep the model, and its moving average.
RAW_CONTAINERS = ("state_dict", "model_state_dict", "model", "module")
EMA_CONTAINERS = ("state_dict_ema", "model_ema", "ema", "ema_state_dict")
# Normalisers: ours and RobustBench's (`normalize.mean`; `mu` or `mean` of the model itself), MadryLab's `normalizer.new_mean`.
NORMALIZERS = [
    (module + mean, module + std)
    for module in ("normalize.", "normalizer.", "")
    for mean, std in (("mean", "std"), ("mu", "sigma"), ("new_mean", "new_std"))
]
NORMALIZER_SHAPES = [(3,), (3, 1, 1), (1, 3, 1, 1)]
# Entries beside the tensors of a state dict that no network needs; `n_averaged` is the counter of torch's AveragedModel.
IGNORED_TYPES = (bool, int, float, str, type(None))
IGNORED_TENSORS = ("n_averaged",)
POSITIONS = "pos_embed"
SHOWN_NAMES = 5


@dataclass(frozen=True)
class Weights:
    """Parameters and buffers of a bare network.

    Attributes:
        network: by name, without prefixes and normaliser.
        normalizer: `mean` and `std`, [1, 3, 1, 1], if there was one.
        which: "ema" or "raw", by the key of the training state they were under; None for a file of nothing but weights.
        key: that key, by dots if nested; empty for a file of nothing but weights.
    """

    network: dict[str, Tensor]
    normalizer: dict[str, Tensor] | None
    which: Which | None = None
    key: str = ""


@dataclass(frozen=True)
class PositionGrid:
    """Position embeddings [1, prefix + side², C] of a square grid of patches, after those of class tokens."""

    side: int
    prefix: int

    def side_of(self, positions: Tensor) -> int | None:
        """Side of the grid that other embeddings of the same model were made for; None if they are of no square grid."""
        count = positions.shape[1] - self.prefix if positions.ndim == 3 else 0
        side = math.isqrt(max(count, 0))
        return side if side and side**2 == count else None


def read_weights(path: str | Path, *, which: Which | None = None) -> Weights:
    """Read a weights file (`torch.save`, tensors and plain values only, or safetensors) on the CPU.

    Args:
        path: the file.
        which: of a training state with a moving average: "ema" takes that, "raw" the last weights, None the average if
            there is one.

    Raises:
        UserError: no such file, not a weights file, or no state dict in it (of that kind).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"expected a file of weights, got {str(path)!r}, which {_what_is(path)}.")
    try:
        with path.open("rb") as file:
            head = file.read(512)
        content = _read(path, head)
    except Exception as error:  # a damaged file makes the readers raise nearly anything: struct.error, IndexError, …
        raise UserError(
            f"{path} cannot be read as weights (torch.save with tensors and plain values only, or safetensors): "
            f"{_why_unreadable(head, error)}."
        ) from error
    return parse_weights(content, source=path, which=which)


def parse_weights(content: Any, *, source: str | Path, which: Which | None = None) -> Weights:
    """The weights in what a file held, or in a `state_dict()`; `source` is named in errors. Else as `read_weights`."""
    kind, key, state = _choose(list(_state_dicts(content)), content, which, str(source))
    state = {name: value for name, value in state.items() if not isinstance(value, IGNORED_TYPES)}
    return replace(_bare(state, str(source)), which=kind, key=key)


def load_weights(model: nn.Module, weights: Weights, *, source: str | Path) -> None:
    """Copy `weights` into `model`, which may be a network or `normalize_model(network)`.

    A file without a normaliser fits both (the network's weights are the same). A file with one needs a model with one: its
    network was trained behind it. Position embeddings of another resolution are resampled (bicubic, class token kept).
    Nothing is copied unless everything fits.

    Args:
        model: receives the weights.
        weights: from `read_weights`.
        source: the file, for the error.

    Raises:
        UserError: missing or unexpected names, other shapes, values that are no finite numbers, or a normaliser the model
            lacks; the first names are listed.
    """
    normalized = has_normalizer(model)
    if weights.normalizer is not None and not normalized:
        raise UserError(
            f"{source} holds an input normaliser (mean and std), the model has none; build it with add_normalization."
        )
    network = model.model if normalized else model
    expected, grid = network.state_dict(), position_grid(network)
    problems = differences(expected, weights.network, grid)
    if problems:
        raise UserError(
            f"{source} does not fit the model ({len(expected)} tensors expected, {len(weights.network)} found): "
            f"{listed(problems)}. Do arch, not_original, updated and num_classes describe this checkpoint?"
        )
    # Such weights come from a run that diverged or a damaged file; they would show as the accuracy of a guess.
    broken = [name for name, value in weights.network.items() if not value.isfinite().all()]
    if broken:
        raise UserError(f"{source} holds values that are not finite: {listed(broken)}.")
    network.load_state_dict(_resized(weights.network, expected, grid))
    if weights.normalizer is not None:
        model.normalize.load_state_dict(weights.normalizer)


def has_normalizer(model: nn.Module) -> bool:
    """Whether `model` was made by `utils_architecture.normalize_model`."""
    children = [name for name, _ in model.named_children()]
    return children == ["normalize", "model"]


def position_grid(network: nn.Module) -> PositionGrid | None:
    """The grid of a vision transformer's position embeddings; None without them, or if it is not square."""
    positions, embed = getattr(network, POSITIONS, None), getattr(network, "patch_embed", None)
    height, width = getattr(embed, "grid_size", None) or (0, 1)
    if not isinstance(positions, Tensor) or positions.ndim != 3 or height != width:
        return None
    return PositionGrid(side=height, prefix=positions.shape[1] - height * width)


def differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], grid: PositionGrid | None) -> list[str]:
    """One phrase a tensor that is missing, unexpected, or of another shape or kind, in the model's order.

    Position embeddings may be those of another square grid; `grid` is that of `expected`.
    """
    problems = []
    for name, value in expected.items():
        if name not in found:
            problems.append(f"{name} is missing")
        elif kind := _other_kind(value, found[name]):
            problems.append(f"{name} is {kind}")
        elif found[name].shape != value.shape:
            phrase = f"{name} is {list(found[name].shape)} instead of {list(value.shape)}"
            if name == POSITIONS and grid is not None:
                if grid.side_of(found[name]) and found[name].shape[::2] == value.shape[::2]:
                    continue
                phrase += ", nor of another square image"
            problems.append(phrase)
    return problems + [f"{name} is unexpected" for name in found if name not in expected]


def listed(problems: list[str]) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(problems) - SHOWN_NAMES} more" if len(problems) > SHOWN_NAMES else ""
    return "; ".join(problems[:SHOWN_NAMES]) + more


# ---------------------------------------------------------------------------------------------------- reading
def _what_is(path: Path) -> str:
    return "is a folder" if path.is_dir() else "does not exist"


def _read(path: Path, head: bytes) -> Any:
    if head.startswith(b"PK"):
        with zipfile.ZipFile(path) as archive:
            if (reason := _why_not_weights(archive)) is not None:
                raise zipfile.BadZipFile(reason)
    elif path.suffix == ".safetensors" or head[8:9] == b"{":
        return safetensors.torch.load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _why_not_weights(archive: zipfile.ZipFile) -> str | None:
    names = archive.namelist()
    if not any(name.endswith("/data.pkl") for name in names):
        return f"it is an archive of other files ({listed([repr(name) for name in names])})"
    if any(name.endswith("/constants.pkl") for name in names):
        return "it is TorchScript, a program; expected the state_dict() of the model"
    if (record := damaged_record(archive)) is not None:
        return f"the checksum or header of {record!r} is wrong: it is damaged, or was saved without checksums"
    return None


def _why_unreadable(head: bytes, error: Exception) -> str:
    if not head:
        return "it is empty"
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, such as a link answers with that is not the file's own"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; `git lfs pull` brings the file"
    if isinstance(error, zipfile.BadZipFile):
        cut = str(error) == "File is not a zip file"
        return "its end is missing, so it was not copied or downloaded completely" if cut else str(error)
    if objects := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"it holds Python objects or code ({objects[1]}), which are never loaded"
    if head.isascii() and head.decode("ascii").isprintable():
        return "it is text"
    return f"it is damaged or of another format ({type(error).__name__})"


# ---------------------------------------------------------------------------------------------------- parsing
_Found = tuple[Which | None, str, Mapping[str, Any]]


def _state_dicts(content: Any, which: Which | None = None, key: str = "") -> Iterator[_Found]:
    """(kind, key, state dict) of each one in a training state: tensors by name, plain values between them."""
    if not isinstance(content, Mapping):
        return
    inner: list[_Found] = []
    for name in (*RAW_CONTAINERS, *EMA_CONTAINERS):
        kind: Which = "ema" if which == "ema" or name in EMA_CONTAINERS else "raw"
        inner += _state_dicts(content.get(name), kind, f"{key}.{name}".lstrip("."))
    if inner:
        yield from inner
    elif any(isinstance(value, Tensor) for value in content.values()) and not _not_weights(content):
        yield which, key, content


def _not_weights(content: Mapping[Any, Any]) -> str:
    """The first entry that no state dict has, in words; empty if there is none."""
    for name, value in content.items():
        if not isinstance(name, str):
            return f"the key {name!r}"
        if not isinstance(value, (Tensor, *IGNORED_TYPES)):
            return f"{name}, a {type(value).__name__}"
    return ""


def _choose(found: list[_Found], content: Any, which: Which | None, where: str) -> _Found:
    if not found:
        shown = f"a {type(content).__name__}"
        if isinstance(content, Mapping):
            shown = f"a mapping with {', '.join(map(str, list(content)[:SHOWN_NAMES])) or 'nothing in it'}"
            shown += f" (and {odd})" if (odd := _not_weights(content)) else ""
        raise UserError(
            f"{where} holds no state dict (names and tensors, maybe under {', '.join((*RAW_CONTAINERS, *EMA_CONTAINERS))}); "
            f"got {shown}."
        )
    kinds = [kind for kind, _, _ in found]
    # A file of nothing but weights does not say what they are: it is taken for the raw ones.
    wanted = which or ("ema" if "ema" in kinds else "raw")
    chosen = [entry for entry in found if (entry[0] or "raw") == wanted]
    keys = ", ".join(key or "the file itself" for _, key, _ in chosen or found)
    if not chosen:
        expected = {"ema": f"a moving average (under {', '.join(EMA_CONTAINERS)})", "raw": "raw weights"}[wanted]
        raise UserError(f"{where}: expected {expected}, found only {keys}.")
    if len(chosen) > 1:
        raise UserError(f"{where}: expected one model, found {len(chosen)}: {keys}.")
    return chosen[0]


def _bare(state: dict[str, Tensor], where: str) -> Weights:
    """Without prefixes, in whatever order they are nested, and with the normaliser apart."""
    normalizer = None
    while True:
        state = {name: value for name, value in state.items() if name not in IGNORED_TENSORS}
        prefix = next((p for p in PREFIXES if state and all(name.startswith(p) for name in state)), None)
        pair = next((pair for pair in NORMALIZERS if all(name in state for name in pair)), None)
        if prefix is not None:
            state = {name.removeprefix(prefix): value for name, value in state.items()}
        elif pair is not None and normalizer is None:
            normalizer = {kind: _statistic(state.pop(name), name, where) for kind, name in zip(("mean", "std"), pair)}
            if not (normalizer["std"] > 0).all():
                raise UserError(
                    f"{where}: {pair[1]}: expected positive values, got {normalizer['std'].flatten().tolist()}."
                )
        else:
            break
    for pair in NORMALIZERS:
        if half := [name for name in pair if name in state]:
            other = "a second normaliser" if normalizer else f"no {pair[1 - pair.index(half[0])]}"
            raise UserError(f"{where}: expected mean and std of one input normaliser, got {half[0]} and {other}.")
    return Weights(network=state, normalizer=normalizer)


def _statistic(value: Tensor, name: str, where: str) -> Tensor:
    if value.shape not in NORMALIZER_SHAPES:
        raise UserError(f"{where}: {name} is {list(value.shape)}, expected [1, 3, 1, 1].")
    if (kind := _other_kind(torch.empty(0), value)) or not value.isfinite().all():
        raise UserError(f"{where}: {name} is {kind or 'not finite'}, expected three numbers.")
    return value.reshape(1, 3, 1, 1)


# ---------------------------------------------------------------------------------------------------- fitting
def _other_kind(expected: Tensor, found: Tensor) -> str:
    """In words, what keeps the values of `found` from being copied faithfully; empty for another precision."""
    if found.layout is not torch.strided or found.is_quantized:
        return "sparse or quantised instead of dense"
    if found.is_meta and not expected.is_meta:
        return "a shape without values"
    same_kind = (found.is_floating_point(), found.is_complex()) == (expected.is_floating_point(), expected.is_complex())
    is_float8 = found.is_floating_point() and found.itemsize == 1
    if not same_kind or is_float8:
        return f"{str(found.dtype).removeprefix('torch.')} instead of {str(expected.dtype).removeprefix('torch.')}"
    return ""


def _resized(state: dict[str, Tensor], expected: Mapping[str, Tensor], grid: PositionGrid | None) -> dict[str, Tensor]:
    """`state` with position embeddings for the model's grid; untouched if they are."""
    if grid is None or state[POSITIONS].shape == expected[POSITIONS].shape:
        return state
    side = grid.side_of(state[POSITIONS])
    positions = resample_abs_pos_embed(
        state[POSITIONS], [grid.side] * 2, old_size=[side] * 2, num_prefix_tokens=grid.prefix
    )
    return {**state, POSITIONS: positions}
