"""The models: published architectures with PatchStem or ConvStem, and the input normaliser.

Paper: Singh, Croce, Hein, "Revisiting Adversarial Training for ImageNet: Architectures, Training and
Generalization across Threat Models", NeurIPS 2023. Its ConvStems follow Xiao et al., "Early Convolutions Help
Transformers See Better", NeurIPS 2021; the isotropic ConvNeXt is from Liu et al., "A ConvNet for the 2020s",
CVPR 2022, section 3.3.

Source: timm builds everything except the isotropic ConvNeXt. Changes:
  * ConvStem: replaces the PatchStem after the model is built, with its published weights if requested. The new stem
    keeps PyTorch's default initialisation.
  * Vision transformers interpolate their position embeddings (bicubic, class token unchanged) in every forward pass
    at another image size than they were built for. One model therefore runs at any multiple of its patch size.
  * Published weights are those trained on ImageNet-1k alone, except for names that end in `_21k`.

Names in the state dict are public, because released checkpoints depend on them. To add an architecture, add one entry
to `ARCHITECTURES`.
"""

from __future__ import annotations

import difflib
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from huggingface_hub import hf_hub_download
from timm.data.constants import IMAGENET_DEFAULT_MEAN as IMAGENET_MEAN
from timm.data.constants import IMAGENET_DEFAULT_STD as IMAGENET_STD
from timm.layers import DropPath, LayerNorm2d, PatchEmbed, trunc_normal_
from timm.models import is_model_in_modules
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from common.errors import UserError

TIMM_PREFIX, TORCHVISION_PREFIX = "timm_", "torchvision_"


# ------------------------------------------------------------------------------------------------------ stems
class ConvStem(nn.Module):
    """Convolutional stem: 3x3 convolutions, each followed by channel LayerNorm (eps 1e-6) and GELU, and an optional 1x1.

    Images (B, in_channels, H, W) become features (B, C, ceil(H / s), ceil(W / s)). Here s is the product of
    `strides`, and C is the last of `channels`, or `out_channels` if there is a final 1x1 convolution.

    Args:
        channels: output channels of the 3x3 convolutions (padding 1, with bias).
        strides: their strides, one for each of `channels`.
        out_channels: output channels of a final 1x1 convolution without norm and activation; None for no such layer.
        in_channels: channels of the image.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        *,
        out_channels: int | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, stride in zip(channels, strides, strict=True):
            # LayerNorm2d permutes to channels last, which is free if the memory format is channels last already.
            layers += [
                nn.Conv2d(in_channels, width, kernel_size=3, stride=stride, padding=1),
                LayerNorm2d(width, eps=1e-6),
                nn.GELU(),
            ]
            in_channels = width
        if out_channels is not None:
            layers.append(nn.Conv2d(in_channels, out_channels, kernel_size=1))
        self.stem = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x)


@dataclass(frozen=True)
class ConvStemSpec:
    """The ConvStem of an architecture: arguments of `ConvStem`, and `at`, the module that it replaces."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    out_channels: int | None = None
    at: str = "stem"

    @property
    def stride(self) -> int:
        """Total stride: input pixels per output position, in each direction."""
        return math.prod(self.strides)


# ----------------------------------------------------------------------------------------- isotropic ConvNeXt
class IsotropicBlock(nn.Module):
    """ConvNeXt block without layer scale: 7x7 depthwise, LayerNorm, MLP with exact GELU; keeps (B, dim, H, W)."""

    def __init__(self, dim: int, *, mlp_ratio: int = 4, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, mlp_ratio * dim)
        self.pwconv2 = nn.Linear(mlp_ratio * dim, dim)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        branch = self.pwconv2(F.gelu(self.pwconv1(branch))).permute(0, 3, 1, 2)
        return x + self.drop_path(branch)


class IsotropicConvNeXt(nn.Module):
    """Isotropic ConvNeXt: ConvNeXt blocks in a ViT's layout (one resolution, one width). Defaults: the S size.

    Images (B, 3, H, W) become logits (B, num_classes): PatchStem, blocks, mean over positions, LayerNorm, linear
    head. Weights of convolutions and linear layers are initialised as N(0, 0.02²), biases as zero.
    """

    def __init__(
        self,
        *,
        dim: int = 384,
        depth: int = 18,
        patch_size: int = 16,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.stem: nn.Module = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)
        # Stochastic depth grows linearly from the first block to the last, as in timm's ConvNeXt.
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.Sequential(*(IsotropicBlock(dim, drop_path_rate=rate) for rate in rates))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.head(self.norm(x.mean(dim=(2, 3))))


# ------------------------------------------------------------------------------------ models for 32x32 images
def _convnext_micro(**kwargs: Any) -> nn.Module:
    # After a stem of stride 2, timm halves the resolution before every stage: from 32 pixels to 8, 4, 2 and 1. Most of
    # the depth is therefore early. A first stage at 16 pixels would cost more CPU time than its accuracy is worth.
    return ConvNeXt(depths=(2, 2, 1, 1), dims=(48, 80, 96, 112), patch_size=2, **kwargs)


def _vit_micro(*, img_size: int = 32, **kwargs: Any) -> nn.Module:
    # MLP ratio 2: from the compact transformers that Hassani et al. (2021) train on CIFAR.
    layout = {"patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4, "mlp_ratio": 2}
    return VisionTransformer(img_size=img_size, **layout, **kwargs)


# ------------------------------------------------------------------------------------------------------ table
@dataclass(frozen=True)
class Architecture:
    """One entry of `ARCHITECTURES`.

    Attributes:
        family: "convnext", "convnext_iso", "vit", "resnet", "densenet", "inception" or "timm". The "vit" family
            interpolates position embeddings.
        builder: timm's name, with the tag of its published weights if there are any; or a function that builds the
            model.
        options: further keyword arguments of the builder.
        pretrained: published weights of exactly this model exist.
        conv_stem: the ConvStem that `not_original` selects; None if there is none.
        img_size: side of the square images it is designed for, in pixels.
        fixed_size: the builder accepts the argument `img_size`.
        updated_dim: the width that `updated` selects; None if there is none.
    """

    family: str
    builder: str | Callable[..., nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict)
    pretrained: bool = True
    conv_stem: ConvStemSpec | None = None
    img_size: int = 224
    fixed_size: bool = False
    updated_dim: int | None = None


_vit_stem = partial(ConvStemSpec, (48, 96, 192, 384), (2, 2, 2, 2), at="patch_embed.proj")
_convnext = partial(Architecture, "convnext")
_vit = partial(Architecture, "vit", fixed_size=True)

ARCHITECTURES: dict[str, Architecture] = {
    # published, with a ConvStem
    "convnext_tiny": _convnext("convnext_tiny.fb_in1k", conv_stem=ConvStemSpec((48, 96), (2, 2))),
    "convnext_tiny_21k": _convnext(
        "convnext_tiny.fb_in22k_ft_in1k",
        conv_stem=ConvStemSpec((48, 96), (2, 2)),
    ),
    "convnext_small": _convnext("convnext_small.fb_in1k", conv_stem=ConvStemSpec((48, 96), (2, 2))),
    "convnext_base": _convnext("convnext_base.fb_in1k", conv_stem=ConvStemSpec((64, 96, 128), (2, 2, 1))),
    "convnext_large": _convnext("convnext_large.fb_in1k", conv_stem=ConvStemSpec((96, 144, 192), (2, 2, 1))),
    "convnext_iso": Architecture(
        "convnext_iso",
        IsotropicConvNeXt,
        pretrained=False,
        conv_stem=ConvStemSpec((48, 96, 192, 384), (2, 2, 2, 2), out_channels=384),
        updated_dim=432,
    ),
    "vit_s": _vit("vit_small_patch16_224.augreg_in1k", conv_stem=_vit_stem(out_channels=384)),
    "vit_s_21k": _vit("deit3_small_patch16_224.fb_in22k_ft_in1k", conv_stem=_vit_stem(out_channels=384)),
    "deit_s": _vit("deit_small_patch16_224.fb_in1k", conv_stem=_vit_stem(out_channels=384)),
    "vit_m": _vit("deit3_medium_patch16_224.fb_in1k", conv_stem=_vit_stem(out_channels=512)),
    "vit_b": _vit("vit_base_patch16_224.augreg_in1k", conv_stem=_vit_stem(out_channels=768)),
    # published, without a ConvStem
    "resnet50": Architecture("resnet", "resnet50.a1_in1k"),
    # The weights of ResNet-50 were trained with ReLU; they are not weights of this model.
    "resnet50_gelu": Architecture("resnet", "resnet50", options={"act_layer": "gelu"}, pretrained=False),
    "resnet101": Architecture("resnet", "resnet101.a1h_in1k"),
    "resnet152": Architecture("resnet", "resnet152.a1h_in1k"),
    # ARES trained these two with GELU.
    "resnet152_gelu": Architecture("resnet", "resnet152", options={"act_layer": "gelu"}, pretrained=False),
    "wrn_50_2_gelu": Architecture("resnet", "wide_resnet50_2", options={"act_layer": "gelu"}, pretrained=False),
    "wrn_50_2": Architecture("resnet", "wide_resnet50_2.racm_in1k"),
    "wrn_50_4": Architecture("resnet", "wide_resnet50_2", options={"base_width": 256}, pretrained=False),
    "xcit_m12": Architecture("xcit", "xcit_medium_24_p16_224", options={"depth": 12}, pretrained=False),
    "xcit_l12": Architecture("xcit", "xcit_large_24_p16_224", options={"depth": 12}, pretrained=False),
    "densenet201": Architecture("densenet", "densenet201.tv_in1k"),
    "inception": Architecture("inception", "inception_v3.tv_in1k", img_size=299),
    # not published: small models for 32x32 images
    "convnext_micro": _convnext(
        _convnext_micro,
        pretrained=False,
        # Narrow, with a final 1x1: at 16 pixels wider convolutions would cost a third of the network.
        conv_stem=ConvStemSpec((12, 16), (2, 1), out_channels=48),
        img_size=32,
    ),
    "convnext_iso_micro": Architecture(
        "convnext_iso",
        IsotropicConvNeXt,
        options={"dim": 96, "depth": 6, "patch_size": 4},
        pretrained=False,
        conv_stem=ConvStemSpec((24, 48), (2, 2), out_channels=96),
        img_size=32,
    ),
    "vit_micro": _vit(
        _vit_micro,
        pretrained=False,
        conv_stem=ConvStemSpec((32, 64), (2, 2), out_channels=128, at="patch_embed.proj"),
        img_size=32,
    ),
}


# --------------------------------------------------------------------------------------------------- building
def get_new_model(
    name: str,
    *,
    pretrained: bool = False,
    not_original: bool = False,
    num_classes: int = 1000,
    updated: bool = False,
    drop_path: float | None = None,
    img_size: int | None = None,
    global_pool: str | None = None,
) -> nn.Module:
    """Build the model called `name`: images (B, 3, H, W) to logits (B, num_classes), without input normalisation.

    Args:
        name: a key of `ARCHITECTURES`; or `timm_` and any name known to timm (`timm_resnet50.a1_in1k`); or `torchvision_` and a
            classifier of torchvision, which starts from random weights.
        pretrained: load the published weights, except the head if `num_classes` differs from theirs.
        not_original: replace the PatchStem by the ConvStem, which is freshly initialised even with `pretrained`.
        num_classes: number of classes.
        updated: the wider variant (only `convnext_iso`: width 432, in blocks and ConvStem).
        drop_path: stochastic depth rate of the last block in [0, 1), growing linearly from 0; None: timm's
            default for the architecture.
        img_size: side of the square images in pixels; None for the architecture's default. It sets the number of
            position embeddings. Models without position embeddings accept every image size.
        global_pool: input of a ViT's head in timm's terms ("avg": the mean over patches); None for the default.

    Raises:
        UserError: unknown name; a variant or published weights that the architecture does not have; weights that
            cannot be downloaded; an image size that the patches do not divide; an unsupported rate.
    """
    architecture = _find(name)
    if drop_path is not None and not 0 <= drop_path < 1:
        raise UserError(f"drop_path: expected a rate in [0, 1), got {drop_path}.")
    if updated:
        architecture = _widened(name, architecture)
    stem = architecture.conv_stem
    if not_original and stem is None:
        with_stem = ", ".join(key for key, entry in ARCHITECTURES.items() if entry.conv_stem)
        raise UserError(f"not_original: {name!r} has no ConvStem; architectures with one: {with_stem}.")
    if pretrained:
        check_pretrained(name)
    arguments = dict(architecture.options, num_classes=num_classes)
    if drop_path is not None:
        arguments["drop_path_rate"] = drop_path
    if img_size is not None and architecture.fixed_size:
        arguments["img_size"] = img_size
    if architecture.family == "vit":
        arguments["dynamic_img_size"] = True
    if global_pool is not None:
        arguments["global_pool"] = global_pool
    model = _build(name, architecture.builder, pretrained, arguments)
    if img_size is not None:
        _check_patches(name, model, img_size)
    if not_original:
        model.set_submodule(stem.at, ConvStem(stem.channels, stem.strides, out_channels=stem.out_channels))
    return model


def check_pretrained(name: str) -> None:
    """Check that published weights exist for an architecture; downloads nothing.

    Raises:
        UserError: unknown name, or no weights.
    """
    if not _find(name).pretrained:
        raise UserError(
            f"pretrained: no published weights exist for {name!r}; turn it off, and start from a checkpoint if there is one."
        )


def _find(name: str) -> Architecture:
    """Return the entry of a name, newly made for `timm_…` and `torchvision_…`; raises UserError with the nearest name."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    timm_name = name.removeprefix(TIMM_PREFIX)
    is_timm = timm.is_model(timm_name)
    if is_timm and timm_name != name:
        return _timm_architecture(name, timm_name)
    of_torchvision = name.removeprefix(TORCHVISION_PREFIX)
    if of_torchvision != name and of_torchvision in torchvision.models.list_models(module=torchvision.models):
        builder = partial(torchvision.models.get_model, of_torchvision, weights=None)
        return Architecture("torchvision", builder, pretrained=False)
    candidates = list(ARCHITECTURES)
    if is_timm or name.startswith(TIMM_PREFIX):
        candidates = [TIMM_PREFIX + known for known in timm.list_models()]
    nearest = difflib.get_close_matches(name, candidates, n=1, cutoff=0.0)[0]
    raise UserError(
        f"arch: expected one of {', '.join(ARCHITECTURES)}, {TIMM_PREFIX}<name known to timm> or "
        f"{TORCHVISION_PREFIX}<name known to torchvision>; got {name!r}. The nearest name is {nearest!r}."
    )


def _timm_architecture(name: str, timm_name: str) -> Architecture:
    try:
        cfg = timm.get_pretrained_cfg(timm_name)
    except RuntimeError as error:  # the part after the dot is not a tag
        base = timm_name.split(".")[0]
        tags = ", ".join(TIMM_PREFIX + known for known in timm.list_pretrained(base)) or "none"
        raise UserError(f"arch: timm lists no weights {name!r}; listed for {base!r}: {tags}.") from error
    # Other families with a fixed image size (such as Swin) accept the size, but cannot change it later.
    is_vit = is_model_in_modules(timm_name.split(".")[0], {"vision_transformer", "deit"})
    return Architecture(
        family="vit" if is_vit else "timm",
        builder=timm_name,
        pretrained=cfg is not None and cfg.has_weights,
        img_size=cfg.input_size[-1] if cfg is not None else 224,
        fixed_size=cfg is not None and cfg.fixed_input_size,
    )


def _widened(name: str, architecture: Architecture) -> Architecture:
    """Return the `updated` variant: blocks, and the final 1x1 of the ConvStem, have width `updated_dim`."""
    dim = architecture.updated_dim
    if dim is None:
        having = ", ".join(key for key, entry in ARCHITECTURES.items() if entry.updated_dim)
        raise UserError(f"updated: {name!r} has no updated variant; architectures with one: {having}.")
    options = {**architecture.options, "dim": dim}
    return replace(architecture, options=options, conv_stem=replace(architecture.conv_stem, out_channels=dim))


def _build(
    name: str, builder: str | Callable[..., nn.Module], pretrained: bool, arguments: dict[str, Any]
) -> nn.Module:
    try:
        if not isinstance(builder, str):
            return builder(**arguments)
        if pretrained:
            arguments["pretrained_cfg_overlay"] = _weights_file(builder)
        return timm.create_model(builder, pretrained=pretrained, **arguments)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise UserError(f"drop_path: {name!r} has no stochastic depth; omit it.") from error
    except OSError as error:  # raised by every failed download: no network, no such host, no such file
        if not pretrained:
            raise
        raise UserError(
            f"pretrained: the weights {builder!r} of {name!r} are not in the local cache and could not be downloaded. Connect to "
            f"the network once, or turn it off to start from random weights or a checkpoint. Error of the download: {error}"
        ) from error


def _weights_file(timm_name: str) -> dict[str, Any]:
    """Return where timm finds published weights: on disk, after a download from the Hugging Face hub.

    timm 1.0.9 would download them itself, but does not recognise that huggingface_hub 2.4 is installed. The result is
    empty for weights that are not on the hub, which timm loads itself.
    """
    cfg = timm.get_pretrained_cfg(timm_name)
    if not cfg.hf_hub_id:
        return {}
    file = hf_hub_download(cfg.hf_hub_id, cfg.hf_hub_filename or "model.safetensors")
    if not file.endswith(".safetensors"):
        _check_plain(file, timm_name)
    return {"file": file, "custom_load": False}


def _check_plain(file: str, timm_name: str) -> None:
    """Raise UserError if a pickle contains more than tensors and plain values, because timm would run it."""
    try:
        torch.load(file, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"pretrained: the published weights of {timm_name!r} ({file}) contain Python objects or code, which are never loaded. "
            "Turn it off, or start from a checkpoint."
        ) from error


def _check_patches(name: str, model: nn.Module, img_size: int) -> None:
    """Raise UserError if a vision transformer's patches do not tile the image; timm would drop the remainder."""
    embed = getattr(model, "patch_embed", None)
    if isinstance(embed, PatchEmbed) and img_size % embed.patch_size[0]:
        raise UserError(f"img_size: {name!r} needs multiples of its patch size, {embed.patch_size[0]}; got {img_size}.")


# ---------------------------------------------------------------------------------------------- around models
class Normalize(nn.Module):
    """(x − mean) / std per channel, for images (B, 3, H, W) in [0, 1]; mean and std are buffers [1, 3, 1, 1]."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def normalize_model(
    model: nn.Module, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> nn.Module:
    """Put the input normalisation in front of `model`, so that attacks see pixels in [0, 1].

    The result has the children `normalize` and `model`. Its state dict has the names `normalize.mean`,
    `normalize.std` and `model.<name>`, like released checkpoints with normalisation.
    """
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std), model=model))
