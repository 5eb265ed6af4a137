"""Which network a file of weights holds, from names and shapes alone: architecture, stem, width, classes, image size.

The weights are compared with every entry of `ARCHITECTURES`, built without numbers on PyTorch's meta device. Two entries
may have the same names and shapes; then all that fit are candidates.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
from zoo.description import ROBUSTBENCH_PREFIX
from zoo.loading import (
    POSITIONS,
    PositionGrid,
    Weights,
    differences,
    has_normalizer,
    listed,
    position_grid,
    with_timm_names,
)
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
# Models are built with so many classes to tell the head by: a prime, which no other dimension is.
MARK = 1009


@dataclass(frozen=True)
class Description:
    """What a file of weights holds. All but `add_normalization` is None, and `candidates` empty, if nothing known fits.

    Attributes:
        arch: first of `candidates`.
        global_pool: what its head reads, as timm calls it; None for the architecture's default.
        not_original: it has the ConvStem.
        updated: it is the wide variant.
        num_classes: outputs of the head; None if the architecture's cannot be chosen.
        add_normalization: the file holds an input normaliser.
        img_size: side in pixels of the square images its position embeddings were made for; None without any.
        candidates: names in `ARCHITECTURES` that fit, in the table's order.
        alike: the candidates are one network under several names; False: they have the same weights, but compute different things.
    """

    arch: str | None
    not_original: bool | None
    updated: bool | None
    num_classes: int | None
    add_normalization: bool
    img_size: int | None
    candidates: tuple[str, ...]
    alike: bool
    global_pool: str | None = None

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
        weights: from `read_weights`.
        arch: compare with this architecture only (also a `timm_…` one); None: with all of `ARCHITECTURES`, and where none of them
            fits with all that timm and torchvision have of the family that the names speak of.

    Raises:
        UserError: `arch` is not known.
    """
    fitting = [blueprint for blueprint in _blueprints(weights, arch) if not blueprint.differences(weights)]
    if not fitting and arch is None:
        fitting = [blueprint for blueprint in _of_libraries(weights) if not blueprint.differences(weights)]
    normalized = weights.normalizer is not None
    if not fitting:
        return Description(None, None, None, None, normalized, None, (), True)
    first = fitting[0]
    return Description(
        arch=first.arch,
        not_original=first.not_original,
        updated=first.updated,
        num_classes=first.num_classes(weights),
        add_normalization=normalized,
        img_size=first.img_size(weights),
        candidates=tuple(blueprint.arch for blueprint in fitting),
        alike=all(blueprint.modules == first.modules for blueprint in fitting),
        global_pool=first.global_pool,
    )


def check_description(
    weights: Weights, asked: Mapping[str, Any], *, source: str | Path, by: str = "the flags"
) -> Description:
    """What `weights` hold, made sure to be what was asked for.

    Args:
        weights: from `read_weights`.
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
    if found.arch is None and arch is not None and arch in ARCHITECTURES:
        found = describe_weights(weights)
    if found.arch is None:
        nearest, problems = _nearest(weights, arch)
        known = f"fits {arch}" if arch is not None else "fits a known architecture"
        raise UserError(
            f"{source} does not fit: nothing in it {known}. Nearest is {nearest}, but {listed(problems)}. Other models "
            "of timm have the arch timm_<name>."
            + (" It looks like the image tower of a CLIP model: see `python -m zoo zero-shot`." * _is_tower(weights))
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


def _is_tower(weights: Weights) -> bool:
    return {"class_embedding", "positional_embedding"} <= weights.network.keys()


# ------------------------------------------------------------------------------------------- known architectures
@dataclass(frozen=True)
class _Blueprint:
    """Names and shapes of one variant of an architecture.

    Attributes:
        state: tensors, their values of no meaning; the head is for `MARK` classes.
        head: names of the tensors whose first dimension is the number of classes.
        grid: of its position embeddings.
        stride: pixels of a patch's side.
        modules: a description of its modules, which tells activations and numbers of heads apart.
        network: itself, without values.
    """

    arch: str
    not_original: bool
    updated: bool
    global_pool: str | None
    state: Mapping[str, Tensor]
    head: tuple[str, ...]
    grid: PositionGrid | None
    stride: int
    modules: str
    network: nn.Module

    def differences(self, weights: Weights) -> list[str]:
        """As `zoo.loading.differences`, for the weights' own number of classes."""
        classes = self.num_classes(weights)
        expected = {
            name: value.new_empty(classes or MARK, *value.shape[1:]) if name in self.head else value
            for name, value in self.state.items()
        }
        return differences(expected, self._named(weights), self.grid)

    def num_classes(self, weights: Weights) -> int | None:
        """Of the head in `weights`; None if the model has none whose size can be chosen."""
        network = self._named(weights)
        heads = [network[name] for name in self.head if name in network]
        return len(heads[0]) if heads and heads[0].ndim else None

    def _named(self, weights: Weights) -> Mapping[str, Tensor]:
        """The network's tensors by the names of today."""
        return with_timm_names(without_operators(weights.network), self.network, self.state)

    def img_size(self, weights: Weights) -> int | None:
        return self.stride * self.grid.side_of(weights.network[POSITIONS]) if self.grid is not None else None


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


def _fingerprint(model: nn.Module) -> str:
    """PyTorch's description of the modules, and what it does not show although results depend on it."""
    hidden = [
        f"{name} {key} {vars(module)[key]}"
        for name, module in model.named_modules()
        for key in (
            "num_heads",
            "window_size",
            "shift_size",
            "scale",
            "global_pool",
            "num_prefix_tokens",
            "no_embed_class",
        )
        if key in vars(module)
    ]
    return "\n".join([str(model), *hidden])


@functools.cache
def _blueprint(arch: str, not_original: bool, updated: bool, global_pool: str | None = None) -> _Blueprint:
    options = {} if arch.startswith(ROBUSTBENCH_PREFIX) else {"num_classes": MARK, "global_pool": global_pool}
    build = functools.partial(build_model, arch, not_original=not_original, updated=updated, **options)
    try:
        with torch.device("meta"), _NumbersOnCPU():
            model = build()
    except RuntimeError:  # a few of timm's architectures compute with more numbers while they are built
        model = build()
    model = model.model if has_normalizer(model) else model
    state = model.state_dict()
    grid = position_grid(model)
    return _Blueprint(
        arch=arch,
        not_original=not_original,
        updated=updated,
        global_pool=global_pool,
        state=state,
        head=tuple(name for name, value in state.items() if value.ndim and len(value) == MARK),
        grid=grid,
        stride=model.patch_embed.patch_size[0] if grid is not None else 0,
        modules=_fingerprint(model),
        network=model,
    )


def _blueprints(weights: Weights, arch: str | None) -> Iterator[_Blueprint]:
    """All variants of `arch`, or of every architecture, that have the stem which the weights' names speak of."""
    for name in ARCHITECTURES if arch is None else [arch]:
        yield from _variants(weights, name)


def _variants(weights: Weights, name: str) -> Iterator[_Blueprint]:
    entry = ARCHITECTURES.get(name)
    stem = entry.conv_stem if entry is not None else None
    not_original = stem is not None and any(key.startswith(f"{stem.at}.stem.") for key in weights.network)
    for updated in (False, True) if entry is not None and entry.updated_dim else (False,):
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
        try:
            yield from _variants(weights, arch)
        except (RuntimeError, ValueError, AssertionError):  # one that timm cannot build for so many classes
            continue


def _is_vit(arch: str) -> bool:
    timm_name = arch.removeprefix(TIMM_PREFIX).split(".")[0]
    entry = ARCHITECTURES.get(arch)
    return is_model_in_modules(timm_name, {"vision_transformer", "deit"}) if entry is None else entry.family == "vit"


def _nearest(weights: Weights, arch: str | None) -> tuple[str, list[str]]:
    """The variant with the fewest differences, in words, and those."""
    compared = [(blueprint.differences(weights), blueprint) for blueprint in _blueprints(weights, arch)]
    problems, nearest = min(compared, key=lambda pair: len(pair[0]))
    return f"{nearest.arch} with {'ConvStem' if nearest.not_original else 'no ConvStem'}", problems
