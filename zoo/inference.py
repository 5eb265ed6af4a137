"""Inference of the network of a weights file from names and shapes: architecture, stem, width, classes, image size.

The weights are compared with every entry of `ARCHITECTURES`, built without values on PyTorch's meta device. Several entries may
have the same names and shapes; all that fit are candidates.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.models import is_model_in_modules
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from common.errors import UserError
from utils_architecture import ARCHITECTURES, TIMM_PREFIX, TORCHVISION_PREFIX
from zoo.description import ROBUSTBENCH_PREFIX, NetworkDescription
from zoo.loading import POSITIONS, Weights, differences, grid_side, has_normalizer, listed, with_timm_names
from zoo.meansparse import without_operators
from zoo.models import build_model

FC_NORM = "fc_norm.weight"  # a ViT whose head reads the mean over patches has it instead of norm.weight
# Pattern of a tensor's name (digits as #) → modules of timm, or with an asterisk names in torchvision, whose networks have such
# tensors. The first matching pattern counts.
_FAMILIES = {
    "blocks.#.local_mp.conv#.weight": ("xcit",),
    "blocks_token_only.#.attn.q.weight": ("cait",),
    "layers.#.blocks.#.attn.relative_position_bias_table": ("swin_transformer",),
    "layers.#.blocks.#.attn.cpb_mlp.#.weight": ("swin_transformer_v2",),
    "blocks.#.attn.qkv.weight": ("vision_transformer", "deit"),
    "stages.#.blocks.#.conv_dw.weight": ("convnext",),
    "stages.#.#.dwconv.weight": ("convnext",),
    "features.denseblock#.denselayer#.conv#.weight": ("densenet",),
    "blocks.#.#.conv_pwl.weight": ("mobilenetv3", "efficientnet"),
    "layers.#.#.layers.#.weight": ("mnasnet*",),
    "features.#.conv.#.#.weight": ("mobilenet_v2*",),
    "stage#.#.branch#.#.weight": ("shufflenet*",),
    "layer#.#.conv#.weight": ("resnet",),
    "features.#.weight": ("vgg", "vgg*", "alexnet*"),
}
MARK = 1009  # number of classes of models built here, identifies the head: a prime that no other dimension has
# Attributes of modules that affect results but are not in PyTorch's text form of a module.
HIDDEN = ("num_heads", "window_size", "shift_size", "scale", "global_pool", "num_prefix_tokens", "no_embed_class")


@dataclass(frozen=True, kw_only=True)
class Description(NetworkDescription):
    """Network of a weights file. If nothing known fits, all but `add_normalization` is None and `candidates` is empty."""

    use_blurpool: bool = False  # not visible in weights
    global_pool: str | None = None  # timm's name of the input of the head; None: the architecture's default
    img_size: int | None = None  # side of the square images of the position embeddings in pixels; None: there are none
    candidates: tuple[str, ...] = ()  # names in `ARCHITECTURES` that fit, in its order; `arch` is the first
    alike: bool = True  # candidates are one network under several names; False: they compute different functions

    def __str__(self) -> str:
        if self.arch is None:
            return "no known architecture"
        arch = " or ".join(self.candidates)
        parts = [
            "ConvStem" if self.not_original else "no ConvStem",
            *(["the updated width"] if self.updated else []),
            *(["a normaliser"] if self.add_normalization else []),
            *([f"position embeddings for {self.img_size} px"] if self.img_size else []),
        ]
        return f"{arch} with {', '.join(parts)} and {self.num_classes} classes"


def describe_weights(weights: Weights, arch: str | None = None) -> Description:
    """Infer the network of `weights`; the sizes of head and position embeddings may be arbitrary.

    Args:
        arch: architecture to compare with (also `timm_…`); None: all of `ARCHITECTURES`, and if none fits, all architectures of
            timm and torchvision in the family that the names indicate.

    Raises:
        UserError: `arch` is unknown.
    """
    known = _blueprints(weights, ARCHITECTURES if arch is None else [arch])
    fitting = [blueprint for blueprint in known if not blueprint.differences(weights)]
    if not fitting and arch is None:
        fitting = [blueprint for blueprint in _of_libraries(weights) if not blueprint.differences(weights)]
    normalized = weights.normalizer is not None
    if not fitting:
        return Description(add_normalization=normalized)
    first = fitting[0]
    return Description(
        arch=first.arch,
        not_original=first.not_original,
        updated=first.updated,
        num_classes=first.num_classes(weights) or 1000,  # an architecture with a fixed head is for ImageNet
        add_normalization=normalized,
        global_pool=first.global_pool,
        img_size=first.img_size(weights),
        candidates=tuple(blueprint.arch for blueprint in fitting),
        alike=all(blueprint.modules == first.modules for blueprint in fitting),
    )


def check_description(
    weights: Weights, asked: Mapping[str, Any], *, source: str | Path, by: str = "the flags"
) -> Description:
    """Infer the network of `weights` and check it against the requested values.

    Args:
        asked: any of `arch`, `not_original`, `updated`, `num_classes`, `add_normalization`; None or missing: not requested.
            A file without a normaliser fits a model with one.
        source: the file, for errors.
        by: origin of the requested values, for errors.

    Raises:
        UserError: the file contains another network (shown in the message), or no known one; or several different networks fit
            and `arch` is not requested.
    """
    arch = asked.get("arch")
    found = describe_weights(weights, arch)
    if found.arch is None and arch in ARCHITECTURES:
        found = describe_weights(weights)
    if found.arch is None:
        known = _blueprints(weights, ARCHITECTURES if arch is None else [arch])
        nearest, problems = min(((b, b.differences(weights)) for b in known), key=lambda pair: len(pair[1]))
        stem = "ConvStem" if nearest.not_original else "no ConvStem"
        is_tower = {"class_embedding", "positional_embedding"} <= weights.network.keys()
        hint = " It seems to be the image tower of a CLIP model: see `python -m zoo zero-shot`." if is_tower else ""
        raise UserError(
            f"{source} does not fit {arch or 'a known architecture'}. The nearest is {nearest.arch} with {stem}, but "
            f"{listed(problems)}. For other models of timm, give arch timm_<name>.{hint}"
        )
    wrong = [
        f"{name}={int(value) if isinstance(value, bool) else value}"
        for name in ("arch", "not_original", "updated", "num_classes")
        if (value := asked.get(name)) is not None and value != getattr(found, name)
    ]
    if found.add_normalization and asked.get("add_normalization") is False:
        wrong.append("add_normalization=0")
    if wrong:
        raise UserError(f"{source} does not fit: it is {found}; requested: {', '.join(wrong)} ({by}).")
    if not found.alike:
        raise UserError(
            f"{source} fits {' and '.join(found.candidates)}, which have the same weights but compute different "
            "functions; give arch."
        )
    return found


@dataclass(frozen=True)
class _Blueprint:
    """One variant of an architecture, built without values, with a head for `MARK` classes."""

    arch: str
    not_original: bool
    updated: bool
    global_pool: str | None
    network: nn.Module

    @cached_property
    def state(self) -> Mapping[str, Tensor]:
        """Names and shapes of the tensors."""
        return self.network.state_dict()

    @cached_property
    def head(self) -> list[str]:
        """Names of the tensors whose first dimension is the number of classes."""
        return [name for name, value in self.state.items() if value.ndim and len(value) == MARK]

    @cached_property
    def modules(self) -> str:
        """PyTorch's text form of the modules, and the `HIDDEN` attributes that it does not show."""
        modules = self.network.named_modules()
        hidden = [f"{name} {key} {vars(m)[key]}" for name, m in modules for key in HIDDEN if key in vars(m)]
        return "\n".join([str(self.network), *hidden])

    def differences(self, weights: Weights) -> list[str]:
        """Return `zoo.loading.differences` for the weights' number of classes."""
        classes = self.num_classes(weights)
        expected = {
            name: value.new_empty(classes or MARK, *value.shape[1:]) if name in self.head else value
            for name, value in self.state.items()
        }
        return differences(expected, self._named(weights), self.network)

    def num_classes(self, weights: Weights) -> int | None:
        """Return the number of classes of the head in `weights`; None if the model has no head of variable size."""
        network = self._named(weights)
        heads = [network[name] for name in self.head if name in network]
        return len(heads[0]) if heads and heads[0].ndim else None

    def img_size(self, weights: Weights) -> int | None:
        """Return the image size of the position embeddings in `weights`; None if there are none."""
        positions = self._named(weights).get(POSITIONS)
        side = grid_side(self.network, positions) if positions is not None else 0
        if not side:
            return None
        embed = self.network.patch_embed
        return side * (embed.img_size[0] // embed.grid_size[0])

    def _named(self, weights: Weights) -> Mapping[str, Tensor]:
        """Return the weights under timm's current names."""
        return with_timm_names(without_operators(weights.network), self.network, self.state)


# In-place functions that only change values. They do nothing on meta tensors but take four fifths of the build time.
_INITIALISERS = {"uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_"}


class _NumbersOnCPU(TorchFunctionMode):
    """Computes linspace on the CPU, because timm reads its values (drop path rates) while it builds a model on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _INITIALISERS:
            target = args[0] if args else kwargs["tensor"]  # for functions of torch.nn.init
            if target.is_meta:
                return target
        return func(*args, **({"device": "cpu"} | kwargs if func is torch.linspace else kwargs))


@functools.cache
def _blueprint(arch: str, not_original: bool, updated: bool, global_pool: str | None = None) -> _Blueprint:
    options = {} if arch.startswith(ROBUSTBENCH_PREFIX) else {"num_classes": MARK, "global_pool": global_pool}
    build = functools.partial(build_model, arch, not_original=not_original, updated=updated, **options)
    try:
        with torch.device("meta"), _NumbersOnCPU():
            model = build()
    except RuntimeError:  # a few architectures of timm read more values while they are built
        model = build()
    network = model.model if has_normalizer(model) else model
    return _Blueprint(arch, not_original, updated, global_pool, network)


def _blueprints(weights: Weights, names: Iterable[str]) -> Iterator[_Blueprint]:
    """Yield all variants of these architectures that have the stem indicated by the weights' names."""
    for name in names:
        entry = ARCHITECTURES.get(name)
        stem = entry and entry.conv_stem
        not_original = stem is not None and any(key.startswith(f"{stem.at}.stem.") for key in weights.network)
        for updated in (False, True) if entry and entry.updated_dim else (False,):
            yield _blueprint(name, not_original, updated)
        if FC_NORM in weights.network and _is_vit(name):
            yield _blueprint(name, not_original, False, "avg")


def _of_libraries(weights: Weights) -> Iterator[_Blueprint]:
    """Yield all architectures of timm and torchvision in the family indicated by the weights' names."""
    patterns = {re.sub(r"\d+", "#", name) for name in without_operators(weights.network)}
    modules = next((modules for pattern, modules in _FAMILIES.items() if pattern in patterns), ())
    names = []
    for module in modules:
        if module.endswith("*"):
            found = torchvision.models.list_models(module=torchvision.models, include=module)
            names += [TORCHVISION_PREFIX + name for name in found]
        else:
            names += [TIMM_PREFIX + name for name in timm.list_models(module=module)]
    for arch in sorted(names, key=lambda name: (len(name), name)):
        with suppress(RuntimeError, ValueError, AssertionError):  # timm cannot build it for that many classes
            yield from _blueprints(weights, [arch])


def _is_vit(arch: str) -> bool:
    timm_name = arch.removeprefix(TIMM_PREFIX).split(".")[0]
    entry = ARCHITECTURES.get(arch)
    return is_model_in_modules(timm_name, {"vision_transformer", "deit"}) if entry is None else entry.family == "vit"
