"""The last block that computes only what the head reads is the same function, with the same gradients and random numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models import create_model
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from common.processes import Processes
from tests.training.test_step import config_for
from training.build import build_state
from training.shortcuts import trim_last_block
from utils_architecture import ARCHITECTURES, get_new_model, normalize_model

FAMILIES = ("vit", "convnext", "convnext_iso")
LARGE = ("convnext_large", "convnext_base", "vit_b")
# The others are longer or wider than one of these.
NAMES = (
    "convnext_micro",
    "convnext_iso_micro",
    "vit_micro",
    "convnext_tiny",
    "convnext_iso",
    "vit_s",
    "vit_s_21k",
    "vit_m",
)


def scattered(model: nn.Module) -> nn.Module:
    """With weights that leave no branch small and no head zero, as fresh ones do."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.double()


def gradients(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    x = x.clone().requires_grad_()
    torch.manual_seed(0)  # of drop path
    logits = model(x)
    return logits.detach(), list(torch.autograd.grad(logits.square().sum(), [x, *model.parameters()]))


def assert_same(model: nn.Module, x: torch.Tensor) -> None:
    trimmed = copy.deepcopy(model)
    assert trim_last_block(trimmed)
    trimmed = copy.deepcopy(trimmed)  # as the average and the attacked network are
    assert list(trimmed.state_dict()) == list(model.state_dict())
    (expected, theirs), (logits, ours) = gradients(model, x), gradients(trimmed, x)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=0)
    largest = max(gradient.norm() for gradient in theirs)
    for a, b in zip(theirs, ours):
        assert (a - b).norm() <= 1e-10 * a.norm() + 1e-14 * largest  # that of a key's bias is rounding alone


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_architecture(name):
    model = get_new_model(name, not_original=not name.endswith("21k"), num_classes=10, drop_path=0.3)
    model = normalize_model(scattered(model), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)).double()
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()
    for mode in (True, False):
        assert_same(model.train(mode), x)


def vit(**flags) -> nn.Module:
    layout = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(**layout | flags)


def convnext(**flags) -> nn.Module:
    return ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 8, 16), num_classes=5, **flags)


@pytest.mark.parametrize(
    "name", [n for n, a in ARCHITECTURES.items() if a.family in FAMILIES and n not in NAMES + LARGE]
)
def test_the_others_too(name):
    assert trim_last_block(get_new_model(name, num_classes=2))


@pytest.mark.parametrize("flags", [{"qk_norm": True}, {"reg_tokens": 2}, {"qkv_bias": False}, {"init_values": 1e-5}])
def test_other_vision_transformers(flags):
    assert_same(scattered(vit(**flags)), torch.rand(2, 3, 32, 32).double())


@pytest.mark.parametrize(
    "make",
    [
        lambda: vit(global_pool="avg"),
        lambda: vit(global_pool="map"),
        lambda: vit(attn_drop_rate=0.1),
        lambda: vit(proj_drop_rate=0.1),
        lambda: vit(block_fn=type("Other", (nn.Module,), {"__init__": lambda self, **_: nn.Module.__init__(self)})),
        lambda: create_model("deit_tiny_distilled_patch16_224", num_classes=5),
        lambda: convnext(use_grn=True),
        lambda: convnext(conv_mlp=True),
        lambda: convnext(head_norm_first=True),
        lambda: convnext(global_pool="max"),
        lambda: type("Another", (VisionTransformer,), {})(
            img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2
        ),
        lambda: vit(depth=0),
        lambda: create_model("resnet18", num_classes=5),
    ],
)
def test_other_heads_and_blocks_stay(make):
    model = make()
    classes = [type(module) for module in model.modules()]
    assert not trim_last_block(model)
    assert [type(module) for module in model.modules()] == classes


def test_a_block_that_turns_out_otherwise_stays(monkeypatch):
    """As one of another version of timm may."""
    for change in (lambda self, x: self.mlp(x), lambda self, x: self.renamed(x)):
        monkeypatch.setattr("training.shortcuts.ClassTokenBlock.forward", change)
        assert not trim_last_block(vit())


def test_where_training_uses_it():
    for flags, expected in [({}, True), ({"training.trim_last_block": 0}, False), ({"training.eval_only": 1}, False)]:
        state = build_state(config_for(**{"model.arch": "vit_micro"} | flags), Processes.alone("cpu"))
        names = {type(module).__name__ for network in state.networks().values() for module in network.modules()}
        assert ("ClassTokenBlock" in names) == expected
