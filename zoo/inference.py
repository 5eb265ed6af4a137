"""Which network a file of weights holds, from names and shapes alone: architecture, stem, width, classes, image size.

The weights are compared with every entry of `ARCHITECTURES`, built without numbers on PyTorch's meta device. Two entries
may have the same names and shapes; then all that fit are candidates.
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

FC_NORM = "fc_norm.weight"  # what a ViT has instead of norm.weight, whose head reads the mean over patches
# Pattern of a tensor's name, digits as #, → modules of timm, or with an asterisk names of torchvision, whose networks have such
# tensors; the first pattern that occurs counts.
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
MARK = 1009  # classes of the models that are built here, to tell the head by: a prime, which no other dimension is
# Attributes of modules that results depend on, and that PyTorch's description does not show.
HIDDEN = ("num_heads", "window_size", "shift_size", "scale", "global_pool", "num_prefix_tokens", "no_embed_class")


@dataclass(frozen=True, kw_only=True)
class Description(NetworkDescription):
    """What a file of weights holds. All but `add_normalization` is None, and `candidates` empty, if nothing known fits."""

    use_blurpool: bool = False  # leaves no trace in weights
    global_pool: str | None = None  # what its head reads, as timm calls it; None for the architecture's default
    img_size: int | None = None  # side in pixels of the square images its position embeddings are for; None without any
    candidates: tuple[str, ...] = ()  # names in `ARCHITECTURES` that fit, in the table's order; `arch` is the first
    alike: bool = True  # these are one network by several names; False: with the same weights they compute other things

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
    """Infer which network `weights` belong to; the size of the head and of the position embeddings may be any.

    Args:
        arch: compare with this architecture only (also a `timm_…` one); None: with all of `ARCHITECTURES`, and where none of them
            fits with all that timm and torchvision have of the family that the names speak of.

    Raises:
        UserError: `arch` is not known.
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
        num_classes=first.num_classes(weights) or 1000,  # an architecture whose head cannot be chosen is ImageNet's
        add_normalization=normalized,
        global_pool=first.global_pool,
        img_size=first.img_size(weights),
        candidates=tuple(blueprint.arch for blueprint in fitting),
        alike=all(blueprint.modules == first.modules for blueprint in fitting),
    )


def check_description(
    weights: Weights, asked: Mapping[str, Any], *, source: str | Path, by: str = "the flags"
) -> Description:
    """What `weights` hold, made sure to be what was asked for.

    Args:
        asked: any of `arch`, `not_original`, `updated`, `num_classes`, `add_normalization`; None, or no entry: not asked.
            A file without a normaliser fits a model with one.
        source: the file, for the error.
        by: who asks, for the error.

    Raises:
        UserError: the file is something else (it says what), or nothing known, or could be networks that differ and
            `arch` is not asked for.
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
        hint = " It looks like the image tower of a CLIP model: see `python -m zoo zero-shot`." if is_tower else ""
        raise UserError(
            f"{source} does not fit: nothing in it fits {arch or 'a known architecture'}. Nearest is {nearest.arch} with {stem}, "
            f"but {listed(problems)}. Other models of timm have the arch timm_<name>.{hint}"
        )
    wrong = [
        f"{name} asks for {int(value) if isinstance(value, bool) else value}"
        for name in ("arch", "not_original", "updated", "num_classes")
        if (value := asked.get(name)) is not None and value != getattr(found, name)
    ]
    if found.add_normalization and asked.get("add_normalization") is False:
        wrong.append("add_normalization asks for 0")
    if wrong:
        raise UserError(f"{source} does not fit: it is {found}; {', '.join(wrong)} ({by}).")
    if not found.alike:
        raise UserError(
            f"{source} fits {' and '.join(found.candidates)}, which have the same weights and compute different "
            "things; expected arch to say which."
        )
    return found


@dataclass(frozen=True)
class _Blueprint:
    """One variant of an architecture, built without values; its head is for `MARK` classes."""

    arch: str
    not_original: bool
    updated: bool
    global_pool: str | None
    network: nn.Module

    @cached_property
    def state(self) -> Mapping[str, Tensor]:
        """Names and shapes of its tensors."""
        return self.network.state_dict()

    @cached_property
    def head(self) -> list[str]:
        """Names of the tensors whose first dimension is the number of classes."""
        return [name for name, value in self.state.items() if value.ndim and len(value) == MARK]

    @cached_property
    def modules(self) -> str:
        """PyTorch's description of the modules, and what it does not show although results depend on it."""
        modules = self.network.named_modules()
        hidden = [f"{name} {key} {vars(m)[key]}" for name, m in modules for key in HIDDEN if key in vars(m)]
        return "\n".join([str(self.network), *hidden])

    def differences(self, weights: Weights) -> list[str]:
        """As `zoo.loading.differences`, for the weights' own number of classes."""
        classes = self.num_classes(weights)
        expected = {
            name: value.new_empty(classes or MARK, *value.shape[1:]) if name in self.head else value
            for name, value in self.state.items()
        }
        return differences(expected, self._named(weights), self.network)

    def num_classes(self, weights: Weights) -> int | None:
        """Of the head in `weights`; None if the model has none whose size can be chosen."""
        network = self._named(weights)
        heads = [network[name] for name in self.head if name in network]
        return len(heads[0]) if heads and heads[0].ndim else None

    def img_size(self, weights: Weights) -> int | None:
        """Of the images that the position embeddings in `weights` are for; None without any."""
        positions = self._named(weights).get(POSITIONS)
        side = grid_side(self.network, positions) if positions is not None else 0
        if not side:
            return None
        embed = self.network.patch_embed
        return side * (embed.img_size[0] // embed.grid_size[0])

    def _named(self, weights: Weights) -> Mapping[str, Tensor]:
        """The weights by the names of today."""
        return with_timm_names(without_operators(weights.network), self.network, self.state)


# In-place functions that only change values, of which a meta tensor has none; they take four fifths of the time to build one.
_INITIALISERS = {"uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_"}


class _NumbersOnCPU(TorchFunctionMode):
    """Lets timm read the numbers of a linspace (drop path rates) while it builds a model on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _INITIALISERS:
            target = args[0] if args else kwargs["tensor"]  # of torch.nn.init's functions
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
    except RuntimeError:  # a few of timm's architectures compute with more numbers while they are built
        model = build()
    network = model.model if has_normalizer(model) else model
    return _Blueprint(arch, not_original, updated, global_pool, network)


def _blueprints(weights: Weights, names: Iterable[str]) -> Iterator[_Blueprint]:
    """All variants of these architectures that have the stem which the weights' names speak of."""
    for name in names:
        entry = ARCHITECTURES.get(name)
        stem = entry and entry.conv_stem
        not_original = stem is not None and any(key.startswith(f"{stem.at}.stem.") for key in weights.network)
        for updated in (False, True) if entry and entry.updated_dim else (False,):
            yield _blueprint(name, not_original, updated)
        if FC_NORM in weights.network and _is_vit(name):
            yield _blueprint(name, not_original, False, "avg")


def _of_libraries(weights: Weights) -> Iterator[_Blueprint]:
    """All that timm and torchvision have of the family that the weights' names speak of."""
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
        with suppress(RuntimeError, ValueError, AssertionError):  # one that timm cannot build for so many classes
            yield from _blueprints(weights, [arch])


def _is_vit(arch: str) -> bool:
    timm_name = arch.removeprefix(TIMM_PREFIX).split(".")[0]
    entry = ARCHITECTURES.get(arch)
    return is_model_in_modules(timm_name, {"vision_transformer", "deit"}) if entry is None else entry.family == "vit"
