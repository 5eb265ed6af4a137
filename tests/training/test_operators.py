"""Operators of a training step, which are kernel launches of a GPU without compilation, and its copies to another layout.

The table of all networks: python -m tests.training.test_operators
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import training.step
from attacks.registry import Attack
from data.transforms import Mixup
from tests.helpers.accelerator import MARKS, Accelerator, register
from tests.training.test_accelerator import Training
from training.ema import EMA

pytestmark = MARKS

# They launch nothing: views, and memory without values.
NOT_LAUNCHED = set(
    "_local_scalar_dense _reshape_alias _unsafe_view alias as_strided detach diagonal empty empty_like empty_strided expand "
    "lift_fresh new_empty new_empty_strided permute select slice split split_with_sizes squeeze t transpose unbind "
    "unfold unsqueeze view".split()
)
PARTS = {
    (Attack, "__call__"): "attack",
    (training.step, "optimizer_step"): "optimizer",
    (EMA, "update"): "optimizer",
    (training.step, "on_device"): "augmentation",
    (Mixup, "__call__"): "augmentation",
}


class Step:
    """Operators of one step of two images of 64 pixels, counted by part, after a first step.

    `operators`: by part; forward and backward passes of the network itself are parts of their own.
    `layouts`: those that copy a tensor to another order of its dimensions in memory, by part, operator and shape.
    """

    def __init__(self, **flags: Any) -> None:
        self._parts, self._network = ["rest"], False
        self.operators, self.layouts = Counter(), Counter()
        settings = {"training.batch_size": 2, "training.grad_accum": 1, "model.num_classes": 4}
        with Accelerator(self._add) as mode, pytest.MonkeyPatch.context() as patch:
            run = Training("fake", mode, size=64, **settings | flags)
            run.step()  # the optimiser makes its state
            for (owner, name), part in PARTS.items():
                patch.setattr(owner, name, self._within(part, getattr(owner, name)))
            run.state.model.register_forward_pre_hook(self._enter)
            run.state.model.register_forward_hook(self._leave)
            self.operators.clear()
            self.layouts.clear()
            run.step()

    def _within(self, part: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._parts.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._parts.pop()

        return call

    def _enter(self, model: nn.Module, images: Any) -> None:
        self._network = False
        self._parts.append("forward")

    def _leave(self, model: nn.Module, images: Any, logits: Tensor) -> None:
        self._parts.pop()
        if logits.requires_grad:
            logits.register_hook(self._begin_backward)

    def _begin_backward(self, gradient: Tensor) -> None:
        self._network = True

    def _add(self, operator: Any, args: tuple, result: Any) -> None:
        name, part = operator.overloadpacket.__name__, self._parts[-1]
        if self._network and torch._C._current_autograd_node() is not None:
            part = "backward"
        if part.endswith("ward"):
            part = f"{'attack' if 'attack' in self._parts else 'training'}'s {part}"
        if name not in NOT_LAUNCHED:
            self.operators[part] += 1
        if name in ("clone", "_to_copy", "copy_"):
            source, target = (args[1], args[0]) if name == "copy_" else (args[0], result)
            if source.shape == target.shape and order(source) != order(target):
                self.layouts[part, name, tuple(source.shape)] += 1


def order(tensor: Tensor) -> list[int]:
    """Return the dimensions longer than 1 in the order of the memory."""
    return sorted((i for i in range(tensor.dim()) if tensor.shape[i] > 1), key=lambda i: -tensor.stride(i))


# Present numbers of a step with mixup, APGD-2, clipping and EMA, for any network; float16 adds to them.
OUTSIDE = {"attack": 92, "optimizer": 21, "augmentation": 33, "rest": 19}
FLOAT16 = {"attack": 25, "optimizer": 8, "rest": 4}
MARGIN = 3  # between versions of PyTorch
# Copies to another layout: of the images, and by timm: in ViTs of the gradient of queries, keys and values, and in ConvNeXts of the
# last stage's gradient, which comes from a mean over positions. The ConvStems have none.
IMAGES = {("augmentation", "_to_copy", (2, 3, 64, 64)): 1}
LAYOUTS = {
    "vit_s": {(2, 17, 3, 6, 64): 12},
    "convnext_tiny": {(2, 2, 2, 768): 3},
    "vit_b": {(2, 17, 3, 12, 64): 12},
    "convnext_base": {(2, 2, 2, 1024): 3},
    "vit_micro": {(2, 257, 3, 4, 32): 6},
}


CASES = [
    ("vit_s", "fp32"),
    ("convnext_tiny", "fp32"),
    ("vit_micro", "fp16"),  # float16 takes long on a CPU
    pytest.param("vit_b", "fp32", marks=pytest.mark.large),
    pytest.param("convnext_base", "fp32", marks=pytest.mark.large),
]


@pytest.mark.parametrize("arch, precision", CASES)
def test_operators_and_layout_copies_of_a_step_have_not_become_more(arch, precision):
    step, half = Step(**{"model.arch": arch, "training.precision": precision}), precision == "fp16"
    print(arch, precision, dict(step.operators))
    for part, limit in OUTSIDE.items():
        assert step.operators[part] <= limit + half * FLOAT16.get(part, 0) + MARGIN, part
    copies = Counter(IMAGES)
    for shape, count in LAYOUTS[arch].items():
        copies[("attack's backward", "clone", shape)] = 2 * count
        copies[("training's backward", "clone", shape)] = count
    assert step.layouts <= copies, step.layouts - copies


def test_a_planted_operator_and_a_planted_layout_copy_are_counted():
    plain = Step(**{"model.arch": "convnext_micro"})
    move = training.step.on_device

    def moved(*args: Any) -> tuple[Tensor, Tensor]:
        x, y = move(*args)
        return x.contiguous().contiguous(memory_format=torch.channels_last), y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.step, "on_device", moved)
        found = Step(**{"model.arch": "convnext_micro"})
    assert found.operators - plain.operators == {"augmentation": 2}
    assert found.layouts - plain.layouts == {("augmentation", "clone", (2, 3, 64, 64)): 2}


if __name__ == "__main__":
    register()
    for arch in LAYOUTS:
        step = Step(**{"model.arch": arch})
        print(f"{arch}: {dict(sorted(step.operators.items()))}, {sum(step.operators.values())} in all")
