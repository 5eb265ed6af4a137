"""Roofline of a step of adversarial training: where its time must go on a GPU, predicted from its operators.

    python -m benchmarks.roofline [--arch vit_s,convnext_tiny] [--batch-size 80] [--json FILE] [--quick]
    python -m benchmarks.roofline --validate        # on this machine's CPU: the same model against a measured step

Every operator of a real `train_step` is recorded with tensors that have no data (FakeTensorMode), at the full batch size. An
operator takes the time of its work or of its bytes, whichever is longer. It reads each distinct input once and writes each output
once; views move nothing. "eager": each operator is one kernel. "compiled": connected pointwise, normalising and reducing operators
inside the network are one kernel, if the same number of other kernels precedes them on the longest path of data. Such a kernel
reads what comes from outside and writes what is read outside.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from attacks.registry import build_attack
from benchmarks.harness import Row, main, options, row
from benchmarks.train_step import config_for, images_again, timed
from common.processes import Processes
from data.loader import Batch
from training.build import build_state
from training.config import TrainConfig
from training.optim import build_optimizer
from training.shortcuts import trim_last_block
from training.state import TrainState
from training.step import train_step

PARTS = ("attack", "training", "update")
# Of the datasheets of H100 and H200 SXM: dense bf16 and fp32 FLOP/s, bytes/s. The attainable shares are assumed, not measured.
BF16, FP32, COPY = 989e12, 67e12, {"h100": 3.35e12, "h200": 4.8e12}
MATMUL_SHARE = 0.70  # large bf16 products
ATTENTION_SHARE = 0.50  # of the rate of large products; short sequences and the softmax between two products
DEPTHWISE_SHARE = 0.25  # of fp32 FLOP/s: no tensor cores, and every input is read from on-chip memory 49 times
COPY_SHARE = 0.90
LAUNCH_SECONDS = 5e-6  # host time of an operator
SAMPLED = 3  # operators of each kind that measure its rate


@dataclass(frozen=True)
class Device:
    """Bytes/s, and work/s of each kind of operator; a kind without a rate is limited by its bytes alone."""

    copy: float
    rates: Mapping[str, float]

    @staticmethod
    def gpu(matmul: float, copy: float) -> Device:
        rates = {"matmul": matmul, "attention": ATTENTION_SHARE * matmul, "depthwise": DEPTHWISE_SHARE * FP32}
        return Device(copy, rates)

    def seconds(self, op: Op) -> float:
        return max(op.work / self.rates.get(op.kind, math.inf), op.moved / self.copy)


@dataclass
class Op:
    """One kernel: FLOPs, and bytes of the tensors read and written, by (storage, offset, size)."""

    kind: str
    part: str
    flops: float
    reads: dict[tuple, int]
    writes: dict[tuple, int]
    fusible: bool = False
    call: tuple = ()  # function, arguments

    @property
    def moved(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values())

    @property
    def work(self) -> float:
        return self.flops or self.moved


def key(tensor: Tensor) -> tuple:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.numel()


def sizes(values: object) -> dict[tuple, int]:
    """Return the bytes of each distinct tensor; one that is expanded has no more than its storage."""
    found = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return {key(t): min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in found}


def flops_of(func: Any, args: Sequence, kwargs: Mapping, out: object) -> float:
    """Return the FLOPs of a matrix product, convolution or attention; 0 for any other operator."""
    name = func.overloadpacket.__name__
    if name == "convolution":  # the registry ignores the groups of a weight gradient
        return 2 * args[1].numel() * out.numel() / out.shape[1]
    if name == "convolution_backward":
        return 2 * args[2].numel() * args[0].numel() / args[0].shape[1] * sum(args[-1][:2])
    count = flop_registry.get(func.overloadpacket)
    return count(*args, **kwargs, out_val=out) if count else 0


class Trace(TorchDispatchMode):
    """Record every operator that moves data; `again` answers each question for a number on the device."""

    def __init__(self, again: int = 0) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.part, self.inside, self.again = "training", False, again
        self.kept: list[object] = []  # so that no address of a storage is used twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            return self.again
        out = func(*args, **kwargs)
        schema = zip(func._schema.arguments, args)
        schema = [*schema, *((a, kwargs[a.name]) for a in func._schema.arguments[len(args) :] if a.name in kwargs)]
        changed = sizes([value for argument, value in schema if argument.alias_info and argument.alias_info.is_write])
        reads, writes = sizes([args, kwargs]), sizes(out) | changed
        known = {storage for storage, *_ in reads}
        if func.namespace != "aten" or name == "as_strided_" or all(k[0] in known and k not in changed for k in writes):
            return out
        if name == "_foreach_norm":  # the first operator after the backward pass
            self.part = "update"
        flops = flops_of(func, args, kwargs, out)
        grouped = name.startswith("convolution") and args[-1 if name == "convolution" else -2] > 1
        kind = "depthwise" if grouped else "attention" if "attention" in name else "matmul" if flops else name
        inside = self.inside or torch._C._current_autograd_node() is not None
        self.kept.append((args, kwargs, out))
        self.ops.append(
            Op(
                *(kind, self.part, flops, reads, writes),
                fusible=inside and not flops and not name.startswith("_foreach"),
                call=(func, args, kwargs),
            )
        )
        return out


class LikeGPU(TorchFunctionMode):
    """Normalise layers in float32 under autocast, as a GPU's autocast does and a CPU's does not."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.layer_norm:
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


def without_data(state: TrainState, config: TrainConfig, mode: FakeTensorMode) -> None:
    """Replace all tensors of the network and its EMA by tensors without data."""
    for network in state.networks().values():
        for module in network.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = nn.Parameter(mode.from_tensor(p).detach(), p.requires_grad)
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer if buffer is None else mode.from_tensor(buffer)
    state.optimizer = build_optimizer(state.model, arch=config.model.arch, training=config.training)


def step_of(state: TrainState, config: TrainConfig, batch: Batch, attack: Any = None) -> None:
    """Take one step of training."""
    attack = attack or build_attack(config.adv)
    flags = {"config": config, "processes": Processes.alone("cpu"), "mixup": None, "lr": 1e-5, "eps": config.adv.eps}
    train_step(state, [batch], attack=attack, **flags)


def prepared(
    arch: str, batch_size: int, *, size: int, precision: str, trim: bool, reuse: bool
) -> tuple[TrainState, TrainConfig, Batch]:
    """Return everything that `step_of` needs."""
    arguments = argparse.Namespace(arch=arch, compile="0")
    config = config_for(arguments, attack="apgd", batch_size=batch_size, size=size, precision=precision)
    state = build_state(config, Processes.alone("cpu"))
    if trim:
        trim_last_block(state.model)
    state.reuses_forward = reuse
    y = torch.arange(batch_size) % config.model.num_classes
    return state, config, Batch(x=torch.rand(batch_size, 3, size, size), y=y, index=y, failures=[])


def recorded(arch: str, batch_size: int, *, again: int = 0, **how: Any) -> list[Op]:
    """Return the operators of one step; `how` is as in `prepared`, `again` as in `Trace`."""
    state, config, batch = prepared(arch, batch_size, **how)
    inner, trace = build_attack(config.adv), Trace(again)

    def enter(module: nn.Module, args: object) -> None:
        trace.inside, trace.before = True, trace.part
        if module.training:  # also the attack's last forward pass, if it is that of training
            trace.part = "training"

    def leave(module: nn.Module, args: object, out: object) -> None:
        trace.inside, trace.part = False, trace.before

    def run(*args: Any, **call: Any) -> Tensor:
        trace.part = "attack"
        x = inner.run(*args, **call)
        trace.part = "training"
        return x

    with FakeTensorMode() as mode:
        without_data(state, config, mode)
        batch = Batch(*(mode.from_tensor(t) if isinstance(t, Tensor) else t for t in batch))
        state.model.register_forward_pre_hook(enter)
        state.model.register_forward_hook(leave)
        with LikeGPU() if how["precision"] == "bf16" else nullcontext():
            for _ in range(2):  # the first step also creates the optimiser's state
                trace.ops.clear()
                with trace:
                    step_of(state, config, batch, replace(inner, run=run))
    return trace.ops


def fused(ops: Sequence[Op]) -> list[Op]:
    """Return the kernels after fusion.

    The level of an operator is the largest number of operators that cannot be fused before it, on any path of data. Operators of
    one level that pass data to one another form a group. No path of data leaves a group and returns.
    """
    writer: dict[int, int] = {}
    level, group, sources, readers = [], list(range(len(ops))), [], defaultdict(set)

    def root(i: int) -> int:
        while group[i] != i:
            i = group[i]
        return i

    for i, op in enumerate(ops):
        sources.append({k: writer.get(k[0]) for k in op.reads})
        before = {j for j in sources[i].values() if j is not None}
        level.append(max((level[j] + (not ops[j].fusible) for j in before), default=0))
        for j in before:
            readers[j].add(i)
            if op.fusible and ops[j].fusible and level[j] == level[i]:
                group[root(j)] = root(i)
        writer.update({k[0]: i for k in op.writes})
    kernels: dict[int, Op] = {}
    for i, op in enumerate(ops):
        if not op.fusible:
            kernels[i] = op
            continue
        kernel = kernels.setdefault(root(i), Op("group", op.part, 0, {}, {}))
        outside = {(k, j) for k, j in sources[i].items() if j is None or root(j) != root(i)}
        kernel.reads |= {(*k, j): op.reads[k] for k, j in outside}
        if any(root(j) != root(i) for j in readers[i]):
            kernel.writes |= {(*k, i): size for k, size in op.writes.items()}
    return list(kernels.values())


def summed(kernels: Sequence[Op], device: Device) -> dict[str, float]:
    """Return the seconds of each part and of the whole step, and the share of its time that its products need at full rate."""
    found = {part: sum(device.seconds(op) for op in kernels if op.part == part) for part in PARTS}
    whole = sum(found.values())
    flops = sum(op.flops for op in kernels if op.kind in ("matmul", "attention"))
    return found | {"whole": whole, "matmul_share": flops / device.rates["matmul"] / whole}


def predict(arguments: argparse.Namespace) -> list[Row]:
    """Return the predictions for each network, device and mode, and what the shortcuts save."""
    devices = {name: Device.gpu(MATMUL_SHARE * BF16, COPY_SHARE * copy) for name, copy in COPY.items()}
    if arguments.matmul_tflops or arguments.copy_gbs:
        h100 = devices["h100"]
        matmul = 1e12 * arguments.matmul_tflops if arguments.matmul_tflops else h100.rates["matmul"]
        devices = {"custom": Device.gpu(matmul, 1e9 * arguments.copy_gbs if arguments.copy_gbs else h100.copy)}
    how = {"size": 64 if arguments.quick else 224, "precision": "bf16"}
    found = []
    for arch in arguments.arch.split(","):
        batch = arguments.batch_size
        plain = recorded(arch, batch, trim=False, reuse=False, **how)
        modes = {"eager": plain, "compiled": fused(plain)}
        shorter = {
            "reuse_forward": fused(recorded(arch, batch, trim=False, reuse=True, **how)),
            "trim_last_block": fused(recorded(arch, batch, trim=True, reuse=False, **how)),
        }
        for mode, kernels in modes.items():
            found.append(row(f"kernels_{arch}_{mode}", [len(kernels)], "kernels"))
        for name, device in devices.items():
            for mode, kernels in modes.items():
                end, total = f"{arch}_{name}_{mode}", summed(kernels, device)
                host = f"host {1000 * LAUNCH_SECONDS * len(kernels):.0f} ms, device {1000 * total['whole']:.0f} ms"
                found.append(row(f"images_per_second_{end}", [batch / total["whole"]], "images/s", note=host))
                found.append(row(f"matmul_share_{end}", [total["matmul_share"]], "of step"))
                found += [row(f"ms_{part}_{end}", [1000 * total[part]], "ms") for part in PARTS]
            for flag, kernels in shorter.items():
                ratio = summed(kernels, device)["whole"] / summed(modes["compiled"], device)["whole"]
                found.append(row(f"{flag}_{arch}_{name}", [ratio], "of step", note="compiled"))
    return found


def seconds_of(op: Op) -> float:
    """Return the median seconds of three calls of an operator, alone, with random values."""

    def real(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return torch.zeros(t.shape, dtype=t.dtype)
        dense = t.numel() * t.element_size() <= t.untyped_storage().nbytes()
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).normal_() if dense else torch.randn(t.shape)

    func, *given = op.call
    args, kwargs = tree_map_only(Tensor, real, given)
    with torch.no_grad():
        func(*args, **kwargs)
        return median(timed(lambda: func(*args, **kwargs), torch.device("cpu")).cpu for _ in range(3))


def samples(ops: Sequence[Op]) -> dict[str, list[tuple[int, Op]]]:
    """Return for each kind the operators that measure its rate, with their number: those with the most work, by shape."""
    alike: dict[str, dict[str, list[Op]]] = defaultdict(lambda: defaultdict(list))
    for op in ops:
        kind = op.kind if op.kind in MEASURED else "copy"
        alike[kind][f"{op.call[0]} {op.flops} {sorted(op.reads.values())}"].append(op)
    largest = {
        kind: sorted(found.values(), key=lambda same: -sum(op.work for op in same))[:SAMPLED]
        for kind, found in alike.items()
    }
    return {kind: [(len(same), same[0]) for same in found] for kind, found in largest.items()}
