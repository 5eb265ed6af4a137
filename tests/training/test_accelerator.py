"""Training on the fake accelerator: the CPU's numbers, on the path of a GPU, and the host never waits in a step."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

import common.processes
import training.step
from attacks.registry import build_attack
from attacks.threat_models import Linf
from common.processes import Processes
from data.augment import concatenated, draw, generator
from data.loader import Batch
from data.prefetch import prefetch
from data.transforms import Mixup
from tests.helpers.accelerator import MARKS, Accelerator, Refused
from tests.training.helpers import base_flags, run
from tests.training.test_step import CLASSES, batch, config_for
from training.build import build_state
from training.checkpoint import LAST, StateFiles, read_state
from training.compiled import frozen_twin, prepare_networks
from training.meter import Meter
from training.run_folder import RunFolder
from training.step import train_step
from training.trainer import Trainer
from training.validation import Validator

pytestmark = MARKS

SIZE, IMAGES = 32, 4
# Everything that a step can do.
ALL = {
    "model.arch": "convnext_micro",
    "model.not_original": 1,
    "model.add_normalization": 1,
    "model.drop_path": 0.2,
    "training.grad_clip": 0.5,
    "training.grad_accum": 2,
    "training.compile": "0",
    "training.reuse_forward": "0",
    "training.trim_last_block": "0",
    "training.batch_size": IMAGES,
}
RADIUS = {"Linf": 8 / 255, "L2": 1.0, "L1": 20.0}
# Where the host may wait before and after the steps.
BUILD, READ = ("copy_", "_to_copy", "equal", "_local_scalar_dense"), ("_to_copy", "_local_scalar_dense")


def as_loaded(seed: int, images: int = IMAGES, size: int = SIZE) -> Batch:
    """Return a batch as the loader gives it to a GPU: levels and draws."""
    plain, rng = batch(n=images, size=size, seed=seed), generator("draws", seed)
    draws = concatenated([draw(rng, size, flip=0.5, heavy=True) for _ in range(images)])
    return pin_memory(plain._replace(x=(plain.x * 255).to(torch.uint8), draws=draws))


class Training:
    """A training state on a device and the steps that it takes."""

    def __init__(self, device: str, mode: Accelerator, *, size: int = SIZE, **flags) -> None:
        self.config, self.processes, self.mode = config_for(**ALL | flags), Processes.alone(device), mode
        with mode.allowed(*BUILD):
            self.state = build_state(self.config, self.processes)
            prepare_networks(self.state, self.config, self.processes, size=size)
        self.attack, self.size, self.results = build_attack(self.config.adv), size, []
        self.mixup = Mixup(num_classes=CLASSES, label_smoothing=0.1)

    def step(self, count: int = 1) -> None:
        training, device = self.config.training, self.processes.device
        for _ in range(count):
            seeds = range(training.grad_accum * self.state.step, training.grad_accum * (self.state.step + 1))
            batches = list(prefetch([as_loaded(seed, training.batch_size, self.size) for seed in seeds], device))
            threat = {"attack": self.attack, "lr": 1e-3, "eps": self.config.adv.eps}
            settings = {"config": self.config, "processes": self.processes, "mixup": self.mixup}
            self.results.append(train_step(self.state, batches, **settings, **threat))

    def found(self) -> dict:
        """Return results and state on the CPU."""
        with self.mode.allowed(*READ):
            return torch.utils._pytree.tree_map_only(
                torch.Tensor, torch.Tensor.cpu, [self.results, self.state.state_dict()]
            )


def after_steps(device: str, count: int = 2, **flags) -> dict:
    with Accelerator() as mode:
        run = Training(device, mode, **flags)
        run.step(count)
        return run.found()


@pytest.mark.parametrize("norm", RADIUS)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16", "fp64"])
def test_steps_equal_the_cpus(precision, norm):
    flags = {"training.precision": precision, "adv.norm": norm, "adv.eps": RADIUS[norm]}
    with mock.patch("torch.cuda.is_available", lambda: True):  # tf32 asks for it
        torch.testing.assert_close(after_steps("fake", **flags), after_steps("cpu", **flags), rtol=0, atol=0)


@pytest.mark.parametrize(
    "arch, precision",
    [("vit_micro", "fp32"), ("vit_micro", "bf16"), ("convnext_iso_micro", "fp32"), ("timm_resnet10t", "fp32")],
)
def test_steps_of_other_networks_equal_the_cpus(arch, precision):
    own = {"model.not_original": 0, "model.drop_path": 0} if arch.startswith("timm") else {}
    flags = {"model.arch": arch, "training.precision": precision, **own}
    torch.testing.assert_close(after_steps("fake", **flags), after_steps("cpu", **flags), rtol=0, atol=0)


SHORTCUTS = {"training.reuse_forward": "1", "training.trim_last_block": "1", "model.drop_path": 0, "adv.eps": 0.5}


@pytest.mark.parametrize("arch", ["vit_micro", "convnext_micro"])
def test_shortcuts_read_one_number_per_micro_batch(arch):
    reads = []
    flags = SHORTCUTS | {"model.arch": arch}
    with Accelerator(lambda operator, *_: reads.append(operator)) as mode:
        run = Training("fake", mode, **flags)
        assert run.state.reuses_forward
        reads.clear()
        with mode.allowed("_local_scalar_dense"):
            run.step(2)
        assert reads.count(torch.ops.aten._local_scalar_dense.default) == 4
        found = run.found()
        with pytest.raises(Refused, match="_local_scalar_dense.*waits"):
            run.step()
    torch.testing.assert_close(found, after_steps("cpu", **flags), rtol=0, atol=0)


def test_clean_and_fgsm_steps_equal_the_cpus():
    for flags in ({"adv.attack": "none"}, {"adv.attack": "fgsm"}):
        torch.testing.assert_close(after_steps("fake", **flags), after_steps("cpu", **flags), rtol=0, atol=0)


def test_twin_of_the_compiled_path_gives_the_same_steps():
    """As `training.compiled` sets it, but not compiled."""
    with Accelerator() as mode:
        run = Training("fake", mode)
        run.state.attacked = frozen_twin(run.state.model)
        run.step(2)
        found = run.found()
    torch.testing.assert_close(found, after_steps("fake"), rtol=0, atol=0)


def test_resumed_state_continues_with_the_same_bits(tmp_path):
    with Accelerator() as mode:
        run = Training("fake", mode, **{"training.precision": "fp16"})
        run.step(2)
        with mode.allowed(*READ):
            files = StateFiles(tmp_path)
            files.save({"step": 2, "train": run.state.state_dict()})
            files.wait()
        assert [outcome.error for outcome in files.outcomes()] == [None]
        resumed = Training("fake", mode, **{"training.precision": "fp16", "data.seed": 1})
        resumed.config = run.config
        with mode.allowed(*BUILD):
            resumed.state.load_state_dict(read_state(tmp_path / LAST)["train"])
        for each in (run, resumed):
            each.results.clear()
            each.step(2)
        torch.testing.assert_close(resumed.found(), run.found(), rtol=0, atol=0)


# --- the mode notices ---------------------------------------------------------------------------------------------------


def planted(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Plant a fault in the step."""
    if fault == "radius on the CPU":
        project = Linf.projection
        radii = torch.full((IMAGES, 1, 1, 1), 0.1)
        monkeypatch.setattr(Linf, "projection", lambda self, x, eps: project(self, x, radii.double()))
        return
    moved, loss = training.step.on_device, training.step.training_loss
    if fault == "labels on the CPU":
        monkeypatch.setattr(training.step, "on_device", lambda batch, *args: (moved(batch, *args)[0], as_loaded(0).y))
    elif fault == "copy from memory that is not pinned":

        def unpinned(batch, *args):
            x, y = moved(batch, *args)
            return x, torch.zeros(len(y), dtype=torch.int64).to(y.device, non_blocking=True)

        monkeypatch.setattr(training.step, "on_device", unpinned)
    else:
        read = {
            "loss read": Tensor.item,
            "loss in a condition": bool,
            "read in the backward pass": lambda loss: loss.register_hook(lambda grad: grad * grad.item()),
            "loss on the CPU": Tensor.cpu,
            "mask": lambda loss: loss[None][loss[None] > 0],
        }[fault]

        def reading(*args, **kwargs):
            found = loss(*args, **kwargs)
            read(found)
            return found

        monkeypatch.setattr(training.step, "training_loss", reading)


@pytest.mark.parametrize(
    "fault, operator",
    [
        ("labels on the CPU", r"aten\.mul.*a tensor on the CPU"),
        ("radius on the CPU", r"aten\.sub.*a tensor on the CPU"),
        ("copy from memory that is not pinned", r"aten\._to_copy.*waits"),
        ("loss read", r"aten\._local_scalar_dense.*waits"),
        ("loss in a condition", r"aten\._local_scalar_dense.*waits"),
        ("loss on the CPU", r"aten\._to_copy.*waits"),
        ("read in the backward pass", r"aten\._local_scalar_dense.*waits"),
        ("mask", r"aten\.index.*waits"),
    ],
)
def test_a_planted_fault_is_refused_by_the_operators_name(fault, operator):
    with pytest.MonkeyPatch.context() as monkeypatch, Accelerator() as mode:
        run = Training("fake", mode)
        planted(monkeypatch, fault)
        with pytest.raises(Refused, match=operator):
            run.step()


def test_a_cpu_number_without_dimensions_is_accepted_as_on_a_gpu():
    with Accelerator(), torch.device("fake"):
        assert (torch.ones(3) * torch.tensor(2.0, device="cpu")).device.type == "fake"


# --- around the step ----------------------------------------------------------------------------------------------------


def test_prefetch_moves_batches_in_order_and_tells_the_gaps():
    gaps = []
    with Accelerator() as mode:
        batches = [as_loaded(seed) for seed in range(3)]
        moved = list(prefetch(batches, torch.device("fake"), lambda *events: gaps.append(events)))
        with mode.allowed(*READ):
            for ours, theirs in zip(moved, batches, strict=True):
                assert ours.x.device.type == ours.y.device.type == "fake"
                assert torch.equal(ours.x.cpu(), theirs.x) and torch.equal(ours.y.cpu(), theirs.y)
    assert len(gaps) == 3 and all(after.query() for _, after in gaps)


# Where the host may wait in a run: building, once per second, validation, saving.
WAITS = {
    (Trainer, "__init__"): BUILD,
    (Meter, "sync"): ("copy_", "_local_scalar_dense", "_to_copy"),
    (Validator, "run"): ("nonzero", "_to_copy"),
    (RunFolder, "save_weights"): READ,
    (RunFolder, "save_best"): READ,
    (Trainer, "save_state"): READ,
}


def test_a_run_equals_the_cpus(images, tmp_path):
    flags = base_flags(images, tmp_path / "cpu") | {
        "model.model_ema": 1,
        "data.augmentations": 1,
        "adv.attack": "apgd",
        "adv.eps": "8/255",
        "validation.adv_n_ex": 8,
        "validation.adv_n_iter": 3,
        "training.precision": "bf16",
        "training.compile": 0,
        "training.reuse_forward": 0,
        "training.trim_last_block": 0,
    }
    expected = run(flags)
    with pytest.MonkeyPatch.context() as patch, Accelerator() as mode:
        for (owner, name), operators in WAITS.items():
            patch.setattr(owner, name, mode.allowing(getattr(owner, name), *operators))
        patch.setattr(common.processes, "_device", lambda rank: torch.device("fake:0"))
        found = run(flags | {"logging.folder": tmp_path / "fake"})
    assert expected.status == found.status == 0
    torch.testing.assert_close(found.weights, expected.weights, rtol=0, atol=0)
    for ours, theirs in zip(found.log, expected.log, strict=True):
        timed = {"seconds", "images_per_second", "tflop_per_second", "data_wait", "validation_seconds", "time"}
        assert ours.pop("peak_memory_gib", 3.0) == 3.0  # of the fake device
        assert {name: value for name, value in ours.items() if name not in timed} == {
            name: value for name, value in theirs.items() if name not in timed
        }
