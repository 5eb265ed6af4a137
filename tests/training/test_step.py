"""One training step: nothing is read back, compiled and eager give the same, memory is saved without other numbers."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data._utils.pin_memory import pin_memory

import training.build
import training.compiled
import training.step
from attacks.apgd import apgd
from attacks.registry import build_attack
from common.errors import UserError
from common.flags import load_config
from common.processes import Processes
from data.augment import concatenated, draw, generator
from data.loader import Batch
from data.prefetch import prefetch
from data.transforms import Mixup
from tests.attacks.test_apgd import GOLDEN, NORMS, GoldenNet, NoReads
from tests.helpers.processes import free_port
from tests.training.helpers import base_flags, run
from training.build import build_state, check_image_sizes
from training.compiled import frozen_twin, prepare_networks, prepare_size
from training.config import COMPILE_MODES, TrainConfig
from training.launch import launch
from training.step import train_step, training_loss
from training.surgery import checkpoint_blocks
from utils_architecture import get_new_model

CLASSES = 4
ALONE = Processes.alone("cpu")


class SmallNet(nn.Module):
    """What makes a difference between eval and train mode, and a LayerNorm, at little cost of compilation."""

    def __init__(self) -> None:
        super().__init__()
        # No bias: in front of a BatchNorm its gradient is rounding noise, of which AdamW makes steps of ± lr.
        self.conv = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.norm = nn.LayerNorm(8)
        self.drop = nn.Dropout(0.25)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = nn.functional.gelu(self.bn(self.conv(x))).mean(dim=(2, 3))
        return self.head(self.drop(self.norm(x)))


class PlainNet(SmallNet):
    """The same function in train and eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = self.drop = nn.Identity()


def config_for(**flags) -> TrainConfig:
    flags = base_flags("none", "none") | {"adv.attack": "apgd", "adv.eps": "8/255", "model.model_ema": 1} | flags
    return load_config(TrainConfig, [f"--{name}={value}" for name, value in flags.items()])


def batch(n=8, size=32, seed=0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, size, size, generator=generator)
    return Batch(x=x, y=torch.arange(n) % CLASSES, index=torch.arange(n), failures=[])


def steps(state, config, count=3, *, mixup=None) -> list[float]:
    losses = []
    for seed in range(count):
        result = train_step(
            state,
            [batch(seed=seed)],
            config=config,
            processes=ALONE,
            attack=build_attack(config.adv),
            mixup=mixup,
            lr=1e-3,
            eps=config.adv.eps,
        )
        losses.append(result)
    return [result[0].item() for result in losses]


# --- nothing is read back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["convnext_micro", "timm_resnet10t"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_reads_nothing_back(arch, precision):
    config, processes = config_for(**{"model.arch": arch, "training.precision": precision}), Processes.alone("cpu")
    state = build_state(config, processes)
    mixup = Mixup(num_classes=CLASSES, label_smoothing=0.1)
    with NoReads():
        train_step(
            state,
            [batch()],
            config=config,
            processes=processes,
            attack=build_attack(config.adv),
            mixup=mixup,
            lr=1e-3,
            eps=config.adv.eps,
        )


def test_a_step_that_reuses_the_attacks_forward_reads_one_number():
    class Reads(NoReads):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                Reads.count += 1
                return func(*args, **(kwargs or {}))
            return super().__torch_dispatch__(func, types, args, kwargs)

    config = config_for(**{"model.arch": "convnext_micro", "training.grad_accum": 2})
    state = build_state(config, ALONE)
    prepare_networks(state, config, ALONE, size=32)
    assert state.reuses_forward
    with Reads():
        train_step(
            state,
            [batch(), batch(seed=1)],
            config=config,
            processes=ALONE,
            attack=build_attack(config.adv),
            mixup=None,
            lr=1e-3,
            eps=0.5,
        )
    assert Reads.count == 2  # one a micro-batch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("compile", ["0", "1"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_step_does_not_synchronise_on_a_gpu(precision, compile):
    config, processes = config_for(**{"training.precision": precision, "training.compile": compile}), Processes.alone()
    state = build_state(config, processes)
    prepare_networks(state, config, processes, size=32)
    mixup = Mixup(num_classes=CLASSES, label_smoothing=0.1)

    def step(moved: Batch) -> None:
        train_step(
            state,
            [moved],
            config=config,
            processes=processes,
            attack=build_attack(config.adv),
            mixup=mixup,
            lr=1e-3,
            eps=config.adv.eps,
        )

    rng = generator("draws")
    draws = concatenated([draw(rng, 32, flip=0.5, heavy=True) for _ in range(8)])
    levels = batch()._replace(x=(batch().x * 255).to(torch.uint8), draws=draws)  # as the loader gives them
    pinned = pin_memory(levels)
    for _ in range(2):  # the first calls load kernels
        step(pinned)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gaps = []
        for moved in prefetch([pinned] * 3, processes.device, lambda *events: gaps.append(events)):
            step(moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert len(gaps) == 3 and all(before.elapsed_time(after) >= 0 for before, after in gaps)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_prefetch_moves_everything_in_order():
    device = torch.device("cuda")
    batches = [batch(seed=seed) for seed in range(4)]
    moved = list(prefetch(batches, device))
    assert all(
        m.x.is_cuda and torch.equal(m.x.cpu(), b.x) and torch.equal(m.y.cpu(), b.y) for m, b in zip(moved, batches)
    )


def test_prefetch_leaves_a_cpu_alone():
    batches = [batch(seed=seed) for seed in range(2)]
    assert all(a is b for a, b in zip(prefetch(batches, torch.device("cpu")), batches))


# --- compiled -------------------------------------------------------------------------------------------------------------


def small_state(monkeypatch, **flags):
    monkeypatch.setattr(training.build, "build_model", lambda *args, **kwargs: SmallNet())
    config = config_for(**flags)
    return build_state(config, ALONE), config


def test_twin_shares_everything_but_mode_and_gradients():
    torch.manual_seed(0)
    model = SmallNet().train()
    twin, x = frozen_twin(model), batch().x
    assert not any(p.requires_grad for p in twin.parameters()) and not any(m.training for m in twin.modules())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(x).square().sum().backward()  # changes the running statistics as well
        optimizer.step()
    assert torch.equal(twin(x), copy.deepcopy(model).eval()(x))
    model.load_state_dict(SmallNet().state_dict())
    assert torch.equal(twin(x), copy.deepcopy(model).eval()(x))


@pytest.mark.parametrize("mode", ["1", *COMPILE_MODES[1:]])
def test_compiled_steps_equal_eager_ones_and_compile_once(mode, monkeypatch):
    """Same random numbers in dropout, weights to rounding, same names; neither validation in between nor more steps compile."""
    from torch._dynamo.utils import counters

    states = {}
    for compile in ("0", mode):
        state, config = small_state(monkeypatch, **{"training.compile": compile, "training.precision": "fp64"})
        begin = copy.deepcopy(state.state_dict())
        graphs = counters["stats"]["unique_graphs"]
        prepare_networks(state, config, ALONE, size=32)
        if compile != "0":
            assert counters["stats"]["unique_graphs"] == graphs + 3  # attack with gradient, without, training
            assert state.attacked is not state.model and state.parallel is not state.model
        torch.testing.assert_close(state.state_dict()["model"], begin["model"], rtol=0, atol=0)
        graphs = counters["stats"]["unique_graphs"]
        losses = steps(state, config, 2)
        state.model.eval()(batch().x.double())
        losses += steps(state, config, 2)
        assert counters["stats"]["unique_graphs"] == graphs
        states[compile] = (losses, state.state_dict())
    (eager_losses, eager), (losses, compiled) = states["0"], states[mode]
    assert losses == pytest.approx(eager_losses, rel=1e-9)
    assert eager["model"].keys() == compiled["model"].keys() == begin["model"].keys()
    for kind in ("model", "ema"):
        for name, value in eager[kind].items():
            torch.testing.assert_close(compiled[kind][name], value, rtol=0, atol=1e-9, msg=name)
    assert max((eager["model"][n].double() - begin["model"][n].double()).abs().max() for n in begin["model"]) > 1e-3


# Of the two processes below: network, flags, and which of the others has the same weights.
WAYS = {
    "batch norm": (SmallNet, {"training.compile": "0"}, "batch norm"),
    "batch norm, compiled": (SmallNet, {"training.compile": "1"}, "batch norm"),
    "plain": (PlainNet, {"training.reuse_forward": "0"}, "plain"),
    "plain, reused": (PlainNet, {"training.reuse_forward": "1"}, "plain"),
    "plain, reused, compiled": (PlainNet, {"training.reuse_forward": "1", "training.compile": "1"}, "plain"),
}


def train_in_all_ways(folder: str, processes: Processes) -> None:
    """One of two processes: five steps of two micro-batches each; the weights go to files."""
    original = torch.compile
    # Everything of the compiler but the writing of kernels, which takes a minute; and a bucket of gradients for each parameter.

    def compile_quickly(model, *, dynamic, options):
        original(model, dynamic=dynamic, options=options)  # refuses options that there are not
        return original(model, dynamic=dynamic, backend="aot_eager")

    torch.compile = compile_quickly
    for name, (network, flags, _) in WAYS.items():
        training.build.build_model = lambda *args, network=network, **kwargs: network()
        config = config_for(**flags, **{"training.precision": "fp64", "training.grad_accum": 2})
        state = build_state(config, processes)
        prepare_networks(state, config, processes, size=32)
        assert (state.attacked is state.model) == (config.training.compile != "1")
        assert state.reuses_forward == ("reused" in name)
        passes, of_batches = [], []
        state.model.register_forward_pre_hook(lambda m, args, p=passes: p.append(len(args[0])) if m.training else None)

        def loss(*args, p=passes, of=of_batches, **kwargs):
            p.clear()
            found = training_loss(*args, **kwargs)
            of.append(list(p))
            return found

        training.step.training_loss = loss
        for seed, eps in enumerate((0.4, 0.4, 0.6, 0.6, 0.4)):
            batches = [batch(seed=10 * seed + 2 * i + processes.rank) for i in range(2)]
            train_step(
                state,
                batches,
                config=config,
                processes=processes,
                attack=build_attack(config.adv),
                mixup=None,
                lr=1e-3,
                eps=eps,
            )
        torch.save(state.model.state_dict(), f"{folder}/{name}_{processes.rank}.pt")
        if name == "plain, reused":
            Path(folder, f"passes_{processes.rank}.json").write_text(json.dumps(of_batches))


def test_two_processes_have_the_same_weights_in_all_ways(tmp_path):
    status = launch(train_in_all_ways, str(tmp_path), world_size=2, address="localhost", port=free_port())
    assert status == 0
    weights = {path.stem: torch.load(path, weights_only=True) for path in tmp_path.glob("*.pt")}
    assert len(weights) == 2 * len(WAYS)
    # Micro-batches of which no image went through the network again, one, and too many; also while the other process's did not.
    first, second = (json.loads((tmp_path / f"passes_{rank}.json").read_text()) for rank in range(2))
    assert {tuple(passes) for passes in first + second} == {(8,), (8, 1), (8, 8)}
    assert any(len(a) != len(b) for a, b in zip(first, second))
    for way, (_, _, same) in WAYS.items():
        for name, value in weights[f"{way}_0"].items():
            torch.testing.assert_close(weights[f"{way}_1"][name], value, rtol=0, atol=0, msg=f"{way}: {name}")
            torch.testing.assert_close(weights[f"{same}_0"][name], value, rtol=0, atol=1e-9, msg=f"{way}: {name}")


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


def test_compiled_attack_equals_the_published_one(golden):
    """Float64: every norm, 2 and 10 updates, hard and soft labels, all on one compiled network."""
    x = torch.from_numpy(golden["x"]).double()
    network = torch.compile(frozen_twin(GoldenNet(golden)), dynamic=False)
    for norm in NORMS:
        for n_iter in (2, 10):
            for labels in ("hard", "soft"):
                y = torch.from_numpy(golden["y"] if labels == "hard" else golden["y_soft"])
                y = y if labels == "hard" else y.double()
                result = apgd(network, x, y, norm=norm, eps=float(golden["eps"][NORMS.index(norm)]), n_iter=n_iter)
                for name in ("x_best", "loss_best", "x_best_adv"):
                    expected = torch.from_numpy(golden[f"{norm}_{n_iter}_{labels}_{name}"]).double()
                    torch.testing.assert_close(getattr(result, name), expected, atol=1e-6, rtol=0, msg=name)


@pytest.mark.slow
def test_compiled_attack_agrees_in_float32(golden):
    """At least 99.9 % of pixels equal the eager attack's; best losses within 1e-3."""
    torch.manual_seed(0)
    network = GoldenNet(golden).float()
    x, y = torch.rand(32, 3, 32, 32), torch.randint(0, 10, (32,))
    eager = apgd(network, x, y, norm="Linf", eps=8 / 255, n_iter=2)
    compiled = apgd(torch.compile(frozen_twin(network), dynamic=False), x, y, norm="Linf", eps=8 / 255, n_iter=2)
    assert (compiled.x_best == eager.x_best).double().mean() >= 0.999
    torch.testing.assert_close(compiled.loss_best, eager.loss_best, rtol=1e-3, atol=0)


@pytest.fixture(scope="module")
def eager_weights(images, tmp_path_factory):
    return run(base_flags(images, tmp_path_factory.mktemp("eager")) | {"adv.attack": "apgd"}).weights


@pytest.mark.parametrize("when", ["compiling", "running"])
def test_without_a_compiler_training_is_eager_and_says_why(images, tmp_path, monkeypatch, capsys, when, eager_weights):
    class Failing(nn.Module):
        def forward(self, x):
            raise RuntimeError("no C++ compiler\nin /usr/bin")

    def compile(model, **kwargs):
        if when == "compiling":
            raise RuntimeError("no C++ compiler")
        return Failing()

    flags = base_flags(images, tmp_path) | {"adv.attack": "apgd"}
    monkeypatch.setattr(torch, "compile", compile)
    outcome = run(flags | {"training.compile": 1})
    assert (
        "warning: training.compile: training runs uncompiled: RuntimeError: no C++ compiler" in capsys.readouterr().err
    )
    assert all(torch.equal(outcome.weights[name], value) for name, value in eager_weights.items())


def fake_compile(model, **kwargs):
    return copy.copy(model)


def test_one_process_that_cannot_compile_keeps_all_from_it(monkeypatch, capsys):
    """It is reported before the others wait for its gradients."""

    class WithAnother(Processes):
        def gather(self, value):
            return [value, "RuntimeError: no C++ compiler"]

    def never(*_, **__):
        raise AssertionError("the others would wait")

    state, config = small_state(monkeypatch, **{"training.compile": "1"})
    monkeypatch.setattr(torch, "compile", fake_compile)
    monkeypatch.setattr(training.compiled, "_rehearse_training", never)
    prepare_networks(state, config, WithAnother(rank=0, world_size=1, device=torch.device("cpu")), size=32)
    assert state.attacked is state.model and state.parallel is state.model
    assert "training runs uncompiled: RuntimeError: no C++ compiler" in capsys.readouterr().err


def test_a_size_that_cannot_be_compiled_is_trained_uncompiled(monkeypatch, capsys):
    state, config = small_state(monkeypatch, **{"training.compile": "1"})
    processes, sizes = Processes.alone("cpu"), []

    def compile(model, **kwargs):
        class Picky(nn.Module):
            def forward(self, x):
                sizes.append(x.shape[-1])
                if x.shape[-1] == 40:
                    raise ValueError("backend='inductor' raised:\n\n  no room\nfor more")
                return model(x)

        return Picky()

    monkeypatch.setattr(torch, "compile", compile)
    prepare_networks(state, config, processes, size=32)
    prepare_size(state, config, processes, size=36)
    assert state.attacked is not state.model and set(sizes) == {32, 36} and not capsys.readouterr().err
    prepare_size(state, config, processes, size=40)
    assert state.attacked is state.parallel is state.model
    assert "uncompiled: ValueError: backend='inductor' raised: no room\n" in capsys.readouterr().err
    sizes.clear()
    prepare_size(state, config, processes, size=44)  # nothing is tried again
    assert not sizes


def test_a_gradient_that_is_not_deterministic_is_refused_at_the_start(monkeypatch):
    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("upsample_bicubic2d_backward does not have a deterministic implementation")

    state, config = small_state(monkeypatch)
    original = state.model.forward
    state.model.forward = lambda x: NoGradient.apply(original(x))
    check_image_sizes(state.model, config)
    state, config = small_state(monkeypatch, **{"training.deterministic": 1})
    check_image_sizes(state.model, config)
    assert all(p.grad is None for p in state.model.parameters())
    original = state.model.forward
    state.model.forward = lambda x: NoGradient.apply(original(x))
    with pytest.raises(UserError, match="images of 32 pixels: upsample_bicubic2d_backward"):
        check_image_sizes(state.model, config)


def test_compile_is_off_on_a_cpu_unless_asked_for():
    for value, expected in (("auto", False), ("0", False), ("1", True)):
        config = config_for(**{"training.compile": value})
        assert training.compiled.wants_compiled(config, Processes.alone("cpu")) is expected


# --- memory ---------------------------------------------------------------------------------------------------------------


def numbers_kept(model, x) -> int:
    """Numbers that a forward pass keeps for the backward pass."""
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    return sum(kept)


@pytest.mark.parametrize("arch", ["convnext_micro", "vit_micro", "convnext_iso_micro"])
def test_checkpointing_gives_the_same_weights_and_keeps_less(arch):
    weights, kept = {}, {}
    for value in (0, 1):
        config = config_for(**{"model.arch": arch, "training.grad_checkpointing": value, "model.not_original": 1})
        state = build_state(config, Processes.alone("cpu"))
        kept[value] = numbers_kept(state.model.train(), batch().x)
        steps(state, config, 2)
        weights[value] = state.state_dict()["model"]
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)
    assert kept[1] < 0.5 * kept[0]


def test_checkpointing_refuses_what_it_would_spoil():
    config = config_for(**{"model.arch": "timm_resnet10t", "training.grad_checkpointing": 1})
    with pytest.raises(UserError, match="training.grad_checkpointing.*batch normalisation"):
        build_state(config, Processes.alone("cpu"))
    with pytest.raises(UserError, match="training.grad_checkpointing.*no modules"):
        checkpoint_blocks(nn.Sequential(nn.Linear(2, 2)))


def test_tf32_needs_a_gpu(monkeypatch):
    config = config_for(**{"training.precision": "tf32"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="training.precision: tf32"):
        build_state(config, ALONE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    build_state(config, ALONE)  # as --check does on a machine with one


def test_stem_norm_equals_reductions_over_channels():
    """The stem of the published code normalises over dimension 1 of NCHW tensors: the same function, to float64's rounding."""
    from benchmarks.published_step import with_channel_norms

    torch.manual_seed(0)
    model = get_new_model("vit_micro", not_original=True, num_classes=CLASSES).double()
    x = batch().x.double()
    published = with_channel_norms(model)
    assert published.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(published(x), model(x), rtol=0, atol=1e-9)
