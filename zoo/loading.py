"""Strict loading of weights of any layout into a given model: every name and shape fits, or nothing is loaded.

A state dict is any mapping of names to tensors, wherever it is in the file. Wrappers leave prefixes (`module.` of DDP,
`base_model.` of attack wrappers, `_orig_mod.` of torch.compile, `1.` of an `nn.Sequential`). A model with a built-in input
normaliser has the names `normalize.*` and `model.*`. `zoo.inference` infers the network of a file.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from common.errors import UserError
from zoo.reading import NORMALIZERS, SHOWN_NAMES, Array, Foreign, listed, modules_state, read_content, three_numbers

# Words in the keys of a training state: the first mark EMA weights, the others contain no network.
AVERAGES = {"ema", "swa", "averaged", "shadow"}
NO_NETWORKS = {"optim", "optimizer", "optimizers", "opt", "sched", "scheduler", "schedulers", "scaler"}
SHADOWS = "shadow_params"  # key of torch_ema: EMA weights as a list, in the order of model.parameters()
_DEEPEST = 20  # largest depth in a training state at which a network is searched
IGNORED_TYPES = (bool, int, float, str, bytes, type(None))  # allowed next to tensors in a state dict
COUNTER = "num_batches_tracked"  # of batch normalisation; does not affect the network's outputs
STATISTICS = ("running_mean", "running_var")  # of batch normalisation; not parameters
_FEW = 3  # a mapping with more tensors than this is a network, whatever else it contains
_LARGEST = 2**30  # elements of a tensor: a strided view in a small file may claim any number
INNER_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # anywhere in names
ATTACKER = "attacker."  # prefix of a second copy of the model in MadryLab's files
POSITIONS, PATCHES = "pos_embed", "patch_embed.proj.weight"


@dataclass(frozen=True)
class Weights:
    """Parameters and buffers of a bare network."""

    network: dict[str, Tensor]  # by name, without prefixes and normaliser
    normalizer: dict[str, Tensor] | None  # `mean` and `std` [1, 3, 1, 1] for images in [0, 1], if there is one
    key: str = ""  # dotted key in a training state; empty: the file contains only weights
    sha256: str = ""  # of the file
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of timm's training script, if in the file


def read_weights(path: str | Path, *, key: str | None = None) -> Weights:
    """Read a weights file (`torch.save`, or safetensors) on the CPU; see `zoo.reading`.

    Args:
        path: the file.
        key: key of one of several networks, dotted if nested. Without it, EMA weights are preferred to raw weights.

    Raises:
        UserError: the file does not exist, is not a weights file, or has no state dict (under that key).
    """
    content, digest = read_content(Path(path))
    return replace(parse_weights(content, source=path, key=key), sha256=digest)


def parse_weights(content: Any, *, source: str | Path, key: str | None = None) -> Weights:
    """Extract the weights from a file's content or a `state_dict()`; `source` is shown in errors. Else as `read_weights`."""
    found = _with_names(list(_state_dicts(content, seen=set())))
    found = found or list(_state_dicts(content, seen=set(), arrays=True))
    chosen = _choose(found, content, key, str(source))
    state = {name: value for name, value in chosen.state.items() if isinstance(value, Tensor)}
    if large := [f"{name}, {list(value.shape)}" for name, value in state.items() if value.numel() > _LARGEST]:
        raise UserError(f"{source}: expected tensors of at most {_LARGEST} elements, got {listed(large)}.")
    # A normaliser may be stored next to the network, together with other statistics.
    for name in itertools.chain(*_normalizers(chosen.beside)):
        value = chosen.beside.get(name)
        value = value if isinstance(value, Tensor) and "." not in name else three_numbers(value)
        if value is not None:
            state[name] = value
    return replace(_bare(state, str(source)), key=chosen.key, arguments=_timm_arguments(content))


def _timm_arguments(content: Any) -> dict[str, Any]:
    """Return the arguments that timm's training script stores in checkpoints under `args`; empty if there are none."""
    args = content.get("args") if isinstance(content, Mapping) else None
    found = args.state if isinstance(args, Foreign) else args
    return found if isinstance(found, dict) and {"model", "mean", "std", "crop_pct"} <= found.keys() else {}


def load_weights(model: nn.Module, weights: Weights, *, source: str | Path, keep: Collection[str] = ()) -> None:
    """Copy `weights` into `model`, which may be a network or `normalize_model(network)`.

    A file without a normaliser fits both, because the network's weights are the same. A file with a normaliser needs a model
    with one, because its network was trained with it. Position embeddings of another resolution are resampled (bicubic, class
    token kept). Nothing is copied unless everything fits. `source` is shown in errors. The model's tensors in `keep`, such as those
    of a new head, are not changed.

    Raises:
        UserError: missing or unexpected names, different shapes, values that are not finite, or a normaliser that the model
            lacks; the first names are listed.
    """
    normalized = has_normalizer(model)
    if weights.normalizer is not None and not normalized:
        raise UserError(f"{source} has an input normaliser, but the model has none; build it with add_normalization.")
    network = model.model if normalized else model
    expected = network.state_dict()
    kept = {name: value for name, value in expected.items() if f"{'model.' * normalized}{name}" in keep}
    found = {**with_timm_names(weights.network, network, expected), **kept}
    if problems := differences(expected, found, network):
        raise UserError(
            f"{source} does not fit the model ({len(expected)} tensors expected, {len(weights.network)} found): "
            f"{listed(problems)}. Do arch, not_original, updated and num_classes describe this checkpoint?"
        )
    # Such weights come from a diverged run or a damaged file; their only symptom would be an accuracy at chance level.
    if broken := [n for n, value in found.items() if not value.to(expected[n].dtype).isfinite().all()]:
        raise UserError(f"{source} contains values that are not finite: {listed(broken)}.")
    if POSITIONS in expected and found[POSITIONS].shape != expected[POSITIONS].shape:
        grid, side = network.patch_embed.grid_size, grid_side(network, found[POSITIONS])
        prefix = expected[POSITIONS].shape[1] - math.prod(grid)
        positions = resample_abs_pos_embed(found[POSITIONS], grid, old_size=[side] * 2, num_prefix_tokens=prefix)
        found = {**found, POSITIONS: positions}
    with torch.no_grad():
        for name, value in found.items():
            expected[name].copy_(value)
    if weights.normalizer is not None:
        model.normalize.load_state_dict(weights.normalizer)


def has_normalizer(model: nn.Module) -> bool:
    """Return whether `model` was created by `utils_architecture.normalize_model`."""
    return [name for name, _ in model.named_children()] == ["normalize", "model"]


def grid_side(network: nn.Module, positions: Tensor) -> int:
    """Return the side of the square patch grid of position embeddings [1, class tokens + side², C]; 0: not for `network`."""
    own, embed = getattr(network, POSITIONS, None), getattr(network, "patch_embed", None)
    height, width = getattr(embed, "grid_size", None) or (0, 1)
    if height != width or not isinstance(own, Tensor) or not own.ndim == positions.ndim == 3:
        return 0
    count = positions.shape[1] - (own.shape[1] - height * width)
    side = math.isqrt(max(count, 0))
    return side if side**2 == count and positions.shape[::2] == own.shape[::2] else 0


def differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], network: nn.Module) -> list[str]:
    """Return a phrase for each tensor that is missing, unexpected, or of another shape or kind, in the model's order.

    Position embeddings may have another square grid; the `expected` tensors are those of `network`.
    """
    problems = []
    for name, value in expected.items():
        if name.endswith(COUNTER):
            continue
        if name not in found:
            problems.append(f"{name} is missing")
        elif kind := _other_kind(value, found[name]):
            problems.append(f"{name} is {kind}")
        elif found[name].shape != value.shape and not (name == POSITIONS and grid_side(network, found[name])):
            square = ", nor of another square image" if name == POSITIONS else ""
            problems.append(f"{name} is {list(found[name].shape)} instead of {list(value.shape)}{square}")
    return problems + [f"{name} is unexpected" for name in found if name not in expected]


def with_timm_names(
    state: Mapping[str, Tensor], network: nn.Module, expected: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """Rename the tensors of `state` to timm's current names, by timm's own rules for older files of this architecture.

    `state` is returned unchanged if these rules do not result in the `expected` names or would compute new values.
    """
    rules = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if rules is None or state.keys() == expected.keys() or len(state) < len(expected):
        return state
    if PATCHES in state and PATCHES in expected and state[PATCHES].shape != expected[PATCHES].shape:
        return state  # the rules would compute new values, which takes seconds
    try:
        renamed = rules(dict(state), network)
    except Exception:  # the rules expect a file of this architecture
        return state
    known = {value.untyped_storage().data_ptr() for value in state.values()}
    same = all(value.untyped_storage().data_ptr() in known for value in renamed.values())
    return renamed if same and renamed.keys() == expected.keys() else state


def _other_kind(expected: Tensor, found: Tensor) -> str:
    """Return why the values of `found` cannot be copied exactly; empty if only the precision differs."""
    if found.layout is not torch.strided or found.is_quantized:
        return "sparse or quantised instead of dense"
    if found.is_meta and not expected.is_meta:
        return "a shape without values"
    same_kind = (found.is_floating_point(), found.is_complex()) == (expected.is_floating_point(), expected.is_complex())
    is_float8 = found.is_floating_point() and found.itemsize == 1
    if not same_kind or is_float8:
        return f"{str(found.dtype).removeprefix('torch.')} instead of {str(expected.dtype).removeprefix('torch.')}"
    return ""


@dataclass(frozen=True)
class _Found:
    """A state dict in a file, its dotted key, and the mapping `beside` that contains it."""

    key: str
    state: Mapping[str, Any]
    beside: Mapping[str, Any]

    @property
    def is_network(self) -> bool:
        """Whether it contains a tensor with at least two dimensions; statistics do not."""
        return any(isinstance(value, Tensor) and value.ndim > 1 for value in self.state.values())


def _words(key: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", key)}


def _state_dicts(
    content: Any, key: str = "", beside: Mapping[str, Any] | None = None, *, seen: set[int], arrays: bool = False
) -> Iterator[_Found]:
    """Yield each mapping of names to tensors in a file once; it may also contain plain values and foreign objects.

    A list under `SHADOWS` counts as one, with indices as names. `arrays`: NumPy arrays count as tensors.
    """
    if id(content) in seen or key.count(".") > _DEEPEST:
        return
    seen.add(id(content))
    if isinstance(content, Foreign):
        content = modules_state(content) or content
    if key.split(".")[-1] == SHADOWS and isinstance(content, list) and content:
        if all(isinstance(value, Tensor) for value in content):
            yield _Found(key[1:], dict(enumerate(content)), {})
    if not isinstance(content, Mapping):
        return
    if arrays:
        content = {name: value.tensor if isinstance(value, Array) else value for name, value in content.items()}
    if any(isinstance(value, Tensor) for value in content.values()) and not _not_weights(content):
        yield _Found(key[1:], content, beside or {})
    for name, value in content.items():
        if isinstance(name, str) and not NO_NETWORKS & _words(name):
            yield from _state_dicts(value, f"{key}.{name}", content, seen=seen, arrays=arrays)


def _with_names(found: list[_Found]) -> list[_Found]:
    """Give EMA weights that are a list the names and buffers of the one network whose parameter shapes they have."""
    averages, networks = [], [entry for entry in found if 0 not in entry.state]
    for entry in (entry for entry in found if 0 in entry.state):
        named = []
        for raw in networks:
            floats = {n: v for n, v in raw.state.items() if isinstance(v, Tensor) and v.is_floating_point()}
            parameters = {n: v.shape for n, v in floats.items() if not n.endswith((COUNTER, *STATISTICS))}
            if list(parameters.values()) == [value.shape for value in entry.state.values()]:
                named.append(replace(entry, state={**raw.state, **dict(zip(parameters, entry.state.values()))}))
        averages += named if len(named) == 1 else []
    return networks + averages


def _not_weights(content: Mapping[Any, Any]) -> str:
    """Return the first entry that a state dict cannot have, in words; empty if there is none."""
    few = sum(isinstance(value, Tensor) for value in content.values()) <= _FEW
    for name, value in content.items():
        if not isinstance(name, str):
            return f"the key {name!r}"
        if not isinstance(value, (Tensor, Foreign, *IGNORED_TYPES)) and few:
            return f"{name}, a {type(value).__name__}"
    return ""


def _choose(found: list[_Found], content: Any, key: str | None, where: str) -> _Found:
    if not found:
        shown = f"a {type(content).__name__}"
        if isinstance(content, Mapping):
            shown = f"a mapping with {', '.join(map(str, list(content)[:SHOWN_NAMES])) or 'no entries'}"
            shown += f" (and {odd})" if (odd := _not_weights(content)) else ""
        raise UserError(f"{where} contains no state dict (a mapping of names to tensors); got {shown}.")
    found = [entry for entry in found if entry.is_network] or found
    if key:
        everywhere, found = found, [entry for entry in found if f"{entry.key}.".startswith(f"{key}.")]
        for entry in everywhere if not found else ():  # the key may be a prefix within a state dict
            if inside := {n.removeprefix(f"{key}."): v for n, v in entry.state.items() if n.startswith(f"{key}.")}:
                found.append(_Found(key, inside, entry.beside))
        if not found:
            raise UserError(f"{where}: expected weights under the key {key}, found only {_keys(everywhere)}.")
    chosen = [entry for entry in found if AVERAGES & _words(entry.key)] or found
    if len(chosen) > 1:
        raise UserError(f"{where}: expected one model, found {len(chosen)}: {_keys(chosen)}; select by weights_key.")
    return chosen[0]


def _keys(found: list[_Found]) -> str:
    return ", ".join(entry.key or "the file itself" for entry in found)


def _bare(state: dict[str, Tensor], where: str) -> Weights:
    """Remove prefixes, in any nesting, and separate the normaliser."""
    normalizer = None
    state = {INNER_WRAPPERS.sub("", name): value for name, value in state.items()}
    while True:
        state.pop("n_averaged", None)  # counter of torch's AveragedModel
        firsts = {name.partition(".")[:2] for name in state}
        pair = next((pair for pair in _normalizers(state) if all(name in state for name in pair)), None)
        if len(firsts) == 1 and (prefix := "".join(firsts.pop())).endswith("."):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
        elif any(name.startswith(ATTACKER) for name in state):
            state = {name: value for name, value in state.items() if not name.startswith(ATTACKER)}
        elif pair is not None and normalizer is None:
            normalizer = {kind: _statistic(state.pop(name), name, where) for kind, name in zip(("mean", "std"), pair)}
            if not (normalizer["std"] > 0).all():
                values = normalizer["std"].flatten().tolist()
                raise UserError(f"{where}: {pair[1]}: expected positive values, got {values}.")
            if max(normalizer["mean"].max(), normalizer["std"].max()) > 2:  # for images in [0, 255], not in [0, 1]
                normalizer = {kind: value / 255 for kind, value in normalizer.items()}
        else:
            break
    for mean, std in _normalizers(state):
        half, missing = (mean, std) if mean in state else (std, mean)
        other = "a second normaliser" if normalizer else f"no {missing}"
        raise UserError(f"{where}: expected mean and std of one input normaliser, got {half} and {other}.")
    return Weights(network=state, normalizer=normalizer)


def _normalizers(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return the names of mean and std of each input normaliser that has at least one of them in `names`."""
    split = [str(name).rpartition(".") for name in names]
    found = [(module + dot, pair) for module, dot, last in split for pair in NORMALIZERS if last in pair]
    return [(module + mean, module + std) for module, (mean, std) in dict.fromkeys(found) if module.count(".") < 2]


def _statistic(value: Tensor, name: str, where: str) -> Tensor:
    if value.shape not in [(3,), (3, 1, 1), (1, 3, 1, 1)]:
        raise UserError(f"{where}: {name} is {list(value.shape)}, expected [1, 3, 1, 1].")
    if (kind := _other_kind(torch.empty(0), value)) or not value.isfinite().all():
        raise UserError(f"{where}: {name} is {kind or 'not finite'}, expected three numbers.")
    return value.reshape(1, 3, 1, 1)
