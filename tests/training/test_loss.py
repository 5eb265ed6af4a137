"""The attack's last forward pass as that of training: the same gradients with a pass less, and only where that holds."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

import training.build
from attacks.registry import build_attack
from common.processes import Processes
from tests.training.test_step import ALONE, CLASSES, PlainNet, SmallNet, batch, config_for
from training.build import build_state
from training.compiled import prepare_networks
from training.shortcuts import change_in_training, places_again
from training.step import training_loss
from utils_architecture import get_new_model

SIZE = 32
# Seed of network and images, eps, and how many of 32 images have their best iterate before the last; there are 2 places.
CASES = [(1, 0.1, 0), (2, 0.1, 1), (6, 0.2, 7)]
PLACES = 2


class Counted(nn.Module):
    """A network that counts the images of each call in train mode and in eval mode."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.calls = {True: [], False: []}

    def forward(self, x):
        self.calls[self.training].append(len(x))
        return self.network(x)


def state_for(monkeypatch, network: nn.Module, **flags):
    monkeypatch.setattr(training.build, "build_model", lambda *args, **kwargs: network)
    config = config_for(**{"training.precision": "fp64", "adv.eps": 0.3} | flags)
    state = build_state(config, ALONE)
    prepare_networks(state, config, ALONE, size=SIZE)
    state.model.train()
    return state, config


def gradients(state, config, x, y) -> tuple[float, list[torch.Tensor]]:
    loss = training_loss(state, x, y, attack=build_attack(config.adv), eps=config.adv.eps)
    loss.backward()
    found = [p.grad for p in state.model.parameters()]
    state.optimizer.zero_grad(set_to_none=True)
    return loss.item(), found


def soft(y):
    return 0.9 * nn.functional.one_hot(y, CLASSES).double() + 0.1 / CLASSES


@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize("seed,eps,others", CASES)
def test_gradients_are_those_of_a_pass_of_its_own(monkeypatch, seed, eps, others, labels):
    """None, some and too many images for the places kept for them."""
    torch.manual_seed(seed)
    network = PlainNet()
    y = torch.arange(32) % CLASSES
    x, y = torch.rand(32, 3, SIZE, SIZE).double(), soft(y) if labels == "soft" else y
    flags = {"adv.eps": eps, "training.reuse_forward": "0"}
    plain, config = state_for(monkeypatch, Counted(copy.deepcopy(network)), **flags)
    reused, _ = state_for(monkeypatch, Counted(network), **flags | {"training.reuse_forward": "1"})
    assert reused.reuses_forward and not plain.reuses_forward
    for state in (plain, reused):
        state.model.calls[True].clear(), state.model.calls[False].clear()
    expected, found = gradients(plain, config, x, y), gradients(reused, config, x, y)
    assert expected[0] == pytest.approx(found[0], rel=1e-12)
    for a, b in zip(expected[1], found[1]):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-12)
    assert plain.model.calls == {False: [32, 32, 32], True: [32]}
    again = [] if others == 0 else [PLACES] if others <= PLACES else [32]
    assert reused.model.calls == {False: [32, 32], True: [32, *again]}


def test_a_last_iterate_without_a_finite_loss_does_not_reach_the_gradients(monkeypatch):
    """Trained on is the iterate before it; a gradient that is not finite would stay so when multiplied by zero."""
    state, config = state_for(monkeypatch, PlainNet(), **{"training.reuse_forward": "1"})
    x, y, calls = batch().x.double(), batch().y, []

    class Overflowing(nn.Module):
        def forward(self, images):
            calls.append(images.detach())
            logits = state.model(images)
            return (
                logits * torch.where(torch.arange(len(images))[:, None] == 3, torch.nan, 1.0)
                if len(calls) == 1
                else logits
            )

    state.parallel = Overflowing()
    loss, found = gradients(state, config, x, y)
    assert len(calls) == 2 and all(torch.isfinite(gradient).all() for gradient in found)
    changed = (calls[0] != calls[1]).flatten(1).any(dim=1)
    assert changed.tolist() == [i == 3 for i in range(8)]
    state.model.zero_grad()
    expected = nn.functional.cross_entropy(state.model(calls[1]), y)
    assert loss == pytest.approx(expected.item(), rel=1e-12)


def test_a_pass_that_is_thrown_away_leaves_no_graph_beside_the_next(monkeypatch):
    """Else training would need twice the memory, once in a while."""
    seed, eps, others = CASES[-1]
    assert others > PLACES
    torch.manual_seed(seed)
    state, config = state_for(monkeypatch, PlainNet(), **{"adv.eps": eps, "training.reuse_forward": "1"})
    x, y = torch.rand(32, 3, SIZE, SIZE).double(), torch.arange(32) % CLASSES
    saved, alive = weakref.WeakSet(), []

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor.detach()
            saved.add(self)

    state.model.register_forward_pre_hook(lambda module, args: alive.append(len(saved)) if module.training else None)
    gc.disable()  # nothing may depend on it
    try:
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda kept: kept.tensor):
            loss = training_loss(state, x, y, attack=build_attack(config.adv), eps=config.adv.eps)
    finally:
        gc.enable()
    assert len(alive) == 2 and alive[1] == 0 and len(saved) > 5
    loss.backward()


@pytest.mark.parametrize("attack", ["fgsm", "none"])
def test_attacks_without_a_last_evaluation_are_trained_as_ever(monkeypatch, attack):
    state, config = state_for(monkeypatch, PlainNet(), **{"training.reuse_forward": "1"})
    assert state.reuses_forward
    attack = build_attack(replace(config.adv, attack=attack))
    x, y = batch().x.double(), batch().y
    torch.manual_seed(0)
    loss = training_loss(state, x, y, attack=attack, eps=0.1)
    torch.manual_seed(0)
    images = attack(state.attacked, x, y, eps=0.1)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(state.model(images), y))


def test_places():
    assert [places_again(n) for n in (1, 8, 16, 17, 80)] == [1, 1, 1, 2, 5]


# --- where it holds -------------------------------------------------------------------------------------------------------


class DropPath(nn.Module):
    """As timm's: without a layer of dropout."""

    def forward(self, x):
        return x * x.new_empty(len(x), 1, 1, 1).bernoulli_(0.999) if self.training else x


class BatchStatistics(nn.Module):
    """Batch normalisation that keeps no statistics: the same in both modes, but not a function of each image."""

    def forward(self, x):
        return nn.functional.batch_norm(x, None, None, training=True)


class Quieter(nn.Module):
    """Another function in training that neither draws nor keeps anything."""

    def forward(self, x):
        return x * 0.9 if self.training else x


@pytest.mark.parametrize(
    "place,layer,words",
    [
        ("drop", nn.Dropout(0.01), "draws random numbers"),
        ("bn", DropPath(), "draws random numbers"),
        ("bn", nn.BatchNorm2d(8), "changes its buffers"),
        ("bn", BatchStatistics(), "mixes the images"),
        ("drop", Quieter(), "another function"),
        ("drop", nn.Dropout(0.0), None),
    ],
)
def test_a_network_that_changes_in_training_has_a_pass_of_its_own(monkeypatch, capsys, place, layer, words):
    network = PlainNet()
    setattr(network, place, layer)
    before = copy.deepcopy(network.state_dict())
    torch.manual_seed(3)
    random = torch.get_rng_state()
    found = change_in_training(network, torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)))
    assert found is None if words is None else words in found
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    state, _ = state_for(monkeypatch, network, **{"training.reuse_forward": "1", "adv.eps": "8/255"})
    assert state.reuses_forward == (words is None)
    warning = capsys.readouterr().err
    expected = f"warning: training.reuse_forward: training uses a separate forward pass, because the network {found}.\n"
    assert warning == ("" if words is None else expected)
    state_for(monkeypatch, network)
    assert not capsys.readouterr().err  # not asked for by name: nothing to say


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["vit_micro", "convnext_micro", "convnext_iso_micro"])
def test_in_whole_networks_too(arch, precision):
    """Small changes that neither draw nor keep anything, in front of all blocks and layer scales."""
    x = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    x[2] *= 0.3
    network = get_new_model(arch, not_original=True, num_classes=CLASSES)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        assert change_in_training(network, x) is None
        for layer in (BatchStatistics(), Quieter()):
            assert "computes another function" in change_in_training(nn.Sequential(layer, network), x)


def test_a_network_that_cannot_be_tried_has_a_pass_of_its_own():
    class Odd(nn.Module):
        def __deepcopy__(self, memo):
            raise RuntimeError("only leaves support deepcopy")

    assert "could not be tried" in change_in_training(Odd(), torch.rand(3, 3, 8, 8))


def test_on_a_gpu_only_where_asked_for(monkeypatch):
    """It was not measured there: the one number that is read lets a GPU wait."""
    monkeypatch.setattr(training.compiled, "change_in_training", lambda model, x: None)
    monkeypatch.setattr(training.compiled, "on_device", lambda batch, *_: (batch.x, batch.y))
    gpu = Processes(rank=0, world_size=1, device=torch.device("cuda"))
    for processes, value, expected in [
        (ALONE, "auto", True),
        (ALONE, "0", False),
        (gpu, "auto", False),
        (gpu, "1", True),
    ]:
        state, config = state_for(monkeypatch, SmallNet(), **{"training.reuse_forward": value})
        assert training.compiled._reuses_forward(state, config, processes, size=SIZE) is expected


def test_nothing_compiles_after_the_rehearsal(monkeypatch):
    from torch._dynamo.utils import counters

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: original(model, dynamic=False, backend="aot_eager"))
    before = counters["stats"]["unique_graphs"]
    torch.manual_seed(2)
    network = PlainNet()
    x, y = torch.rand(32, 3, SIZE, SIZE).double(), torch.arange(32) % CLASSES
    flags = {"training.compile": "1", "training.reuse_forward": "1", "training.batch_size": 32, "adv.eps": 0.1}
    state, config = state_for(monkeypatch, network, **flags)
    assert (
        counters["stats"]["unique_graphs"] == before + 3
    )  # the attack with gradient, training with all images and with few
    for images in (x, x.flip(0)):
        gradients(state, config, images.contiguous(memory_format=torch.channels_last), y)
    assert counters["stats"]["unique_graphs"] == before + 3
