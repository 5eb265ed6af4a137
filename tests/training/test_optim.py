"""Weight-decay groups by name, and the optimisers' settings."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.config import TrainingConfig
from training.ema import EMA
from training.optim import build_optimizer, parameter_groups
from utils_architecture import get_new_model, normalize_model


def groups_by_name(model, arch, weight_decay=0.05):
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {}
    for group in parameter_groups(model, arch=arch, weight_decay=weight_decay):
        decay.update({names[id(p)]: group["weight_decay"] for p in group["params"]})
    return decay


def test_convnext_decays_norm_weights_and_layer_scale():
    decay = groups_by_name(get_new_model("convnext_micro", not_original=True, num_classes=10), "convnext_micro")
    assert decay["stages.0.blocks.0.gamma"] == decay["stages.0.blocks.0.norm.weight"] == 0.05
    assert decay["stem.stem.1.weight"] == decay["head.fc.weight"] == 0.05
    assert {name for name, value in decay.items() if value == 0} == {n for n in decay if n.endswith(".bias")}


def test_resnet_exempts_batchnorm():
    decay = groups_by_name(get_new_model("resnet50", num_classes=10), "resnet50")
    assert decay["bn1.weight"] == decay["layer1.0.bn2.weight"] == decay["fc.bias"] == 0
    # Only names with `bn` are exempt: the published rule overlooks the shortcut's BatchNorm.
    assert decay["layer1.0.downsample.1.weight"] == 0.05


def test_vit_exempts_one_dimensional():
    model = normalize_model(get_new_model("vit_micro", num_classes=10))
    decay = groups_by_name(model, "vit_micro")
    parameters = dict(model.named_parameters())
    assert {n for n, v in decay.items() if v == 0} == {n for n, p in parameters.items() if p.dim() == 1}
    assert decay["model.pos_embed"] == decay["model.cls_token"] == 0.05


def test_every_trainable_parameter_once():
    model = get_new_model("convnext_micro", num_classes=10)
    model.head.fc.weight.requires_grad_(False)
    grouped = [id(p) for g in parameter_groups(model, arch="convnext_micro", weight_decay=0.1) for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_optimizers():
    model = nn.Linear(3, 2)
    adamw = build_optimizer(model, arch="vit_s", training=TrainingConfig(weight_decay=0.05))
    assert isinstance(adamw, torch.optim.AdamW)
    assert {(g["betas"], g["eps"], g["weight_decay"]) for g in adamw.param_groups} == {
        ((0.9, 0.95), 1e-8, 0.05),
        ((0.9, 0.95), 1e-8, 0.0),
    }
    sgd = build_optimizer(model, arch="vit_s", training=TrainingConfig(optimizer="sgd", momentum=0.8))
    assert isinstance(sgd, torch.optim.SGD) and sgd.param_groups[0]["momentum"] == 0.8


class WithBuffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.register_buffer("average", torch.tensor([4.0]))
        self.register_buffer("count", torch.tensor(3))


@pytest.mark.parametrize("warmup", [False, True])
def test_ema_formula(warmup):
    model = WithBuffers()
    ema = EMA(model, decay=0.9, warmup=warmup)
    expected_weight, expected_buffer = model.weight.detach().clone(), model.average.clone()
    for step in range(1, 200):
        with torch.no_grad():
            model.weight += 1
            model.average *= 1.01
            model.count += 1
        ema.update(model, step)
        d = min(0.9, (1 + step) / (10 + step)) if warmup else 0.9
        expected_weight = d * expected_weight + (1 - d) * model.weight.detach()
        expected_buffer = d * expected_buffer + (1 - d) * model.average
    torch.testing.assert_close(ema.model.weight, expected_weight)
    torch.testing.assert_close(ema.model.average, expected_buffer)
    assert ema.model.count == model.count
    assert not ema.model.weight.requires_grad and not ema.model.training
