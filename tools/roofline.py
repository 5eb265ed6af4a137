"""Roofline of a step of adversarial training: where its time must go on a GPU, predicted from its operators.

    python -m tools.roofline [--arch vit_s] [--batch-size 80] [--json FILE] [--quick]
    python -m tools.roofline --validate     # the same model on this machine's CPU, against a measured step

Every operator of a real `train_step` is recorded with tensors without data (FakeTensorMode), at the full batch size. It takes the
time of its FLOPs or that of its bytes, whichever is longer. It reads each distinct input once and writes each output once; views
move nothing. "eager": each operator is a kernel. "compiled": operators of the network without FLOPs are joined, see `fused`.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from attacks.registry import build_attack
from benchmarks.harness import Row, main, options, row, timed
from benchmarks.train_step import Arm, Setup
from common.processes import Processes
from training.build import build_state
from training.shortcuts import trim_last_block
from training.state import TrainState
from training.step import train_step

# Of the datasheets of H100 and H200 SXM: dense bf16 and fp32 FLOP/s, bytes/s. The attainable shares are assumed, not measured.
BF16, FP32, COPY = 989e12, 67e12, {"h100": 3.35e12, "h200": 4.8e12}
MATMUL_SHARE = 0.70  # large bf16 products
ATTENTION_SHARE = 0.50  # of the rate of large products: short sequences, and a softmax between two products
DEPTHWISE_SHARE = 0.25  # of fp32 FLOP/s: no tensor cores, and each value is read 49 times from on-chip memory
COPY_SHARE = 0.90
LAUNCH_SECONDS = 5e-6  # host time of a kernel
# --validate measures a rate for each of these kinds, which computation limits on a CPU, and one in bytes/s for all others.
ON_CPU = "matmul attention depthwise gelu gelu_backward native_layer_norm native_layer_norm_backward".split()
SAMPLED = 8  # operators that measure the rate of a kind


@dataclass
class Op:
    """A kernel: its work (FLOPs, or bytes if it has none), and bytes read and written by (storage, offset, number of values)."""

    kind: str
    part: str
    work: float
    reads: dict[tuple, int]
    writes: dict[tuple, int]
    fusible: bool = False
    call: tuple = ()  # function and arguments

    def seconds(self, rates: Mapping[str, float]) -> float:
        moved = sum(self.reads.values()) + sum(self.writes.values())
        return max(self.work / rates.get(self.kind, math.inf), moved / rates["copy"])


def sizes(values: object) -> dict[tuple, int]:
    """Return the bytes of each distinct tensor; an expanded one has those of its storage."""
    tensors = [(t, t.untyped_storage()) for t in tree_leaves(values) if isinstance(t, Tensor)]
    return {(s._cdata, t.storage_offset(), t.numel()): min(t.nbytes, s.nbytes()) for t, s in tensors}


class Trace(TorchDispatchMode):
    """Record every operator that moves data; a number that is read back from the device is `again`."""

    def __init__(self, again: int = 0) -> None:
        super().__init__()
        self.ops, self.part, self.inside, self.again = [], "attack", False, again

    def enter(self, network: nn.Module, args: object) -> None:
        self.inside, self.part = True, "training" if network.training else "attack"

    def leave(self, *call: object) -> None:
        self.inside = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            return self.again
        out = func(*args, **kwargs)
        given = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
        changed = [given.get(a.name) for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
        reads, changed = sizes(given), sizes(changed)
        writes, known = sizes(out) | changed, {storage for storage, *_ in reads}
        if func.namespace != "aten" or name == "as_strided_" or all(w[0] in known and w not in changed for w in writes):
            return out
        count, layer = flop_registry.get(func.overloadpacket), given.get("weight")
        if name.startswith("convolution"):  # the registry ignores the groups of a weight gradient
            images = given.get("grad_output", out)
            flops = 2 * layer.numel() * images.numel() / images.shape[1] * sum(given.get("output_mask", [1])[:2])
        else:
            flops = count(*args, **kwargs, out_val=out) if count else 0
        kind = "depthwise" if given.get("groups", 1) > 1 else "attention" if "attention" in name else "matmul"
        self.part = "update" if name == "_foreach_norm" else self.part  # the first operator after the backward pass
        moved, inside = sum(reads.values()) + sum(writes.values()), self.inside or torch._C._current_autograd_node()
        fusible = bool(inside) and not flops and not name.startswith("_foreach")
        call = (func, args, kwargs, out)  # keeps the storages, so that none gets the address of an earlier one
        self.ops.append(Op(kind if flops else name, self.part, flops or moved, reads, writes, fusible, call))
        return out


class LikeGPU(TorchFunctionMode):
    """Normalise layers in float32, as a GPU's autocast does and a CPU's does not; nothing changes without autocast."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*((args[0].float(), *args[1:]) if func is F.layer_norm else args), **(kwargs or {}))


def prepared(arch: str, batch_size: int, *, size: int, precision: str, reuse: bool, trim: bool) -> tuple:
    """Return a `TrainState`, its batch and a function that takes a step with both."""
    setup, processes = Setup(arch, batch_size, size, precision, 1, Processes.alone("cpu")), Processes.alone("cpu")
    config = setup.config(Arm("eager"))
    state, attack = build_state(config, processes), build_attack(config.adv)
    state.reuses_forward = bool(reuse)
    if trim:
        trim_last_block(state.model)
    step = partial(train_step, config=config, processes=processes, mixup=None, lr=1e-5, eps=config.adv.eps)
    return state, setup.batch(), lambda state, batch: step(state, [batch], attack=attack)


def recorded(arch: str, batch_size: int, *, again: int = 0, **how) -> list[Op]:
    """Return the operators of one step; arguments as of `prepared` and `Trace`."""
    state, batch, step = prepared(arch, batch_size, **how)
    trace, mode = Trace(again), FakeTensorMode()
    tensors = [t for network in state.networks().values() for t in (*network.parameters(), *network.buffers())]
    state = copy.deepcopy(state, {id(t): mode.from_tensor(t) for t in tensors})
    batch = tree_map_only(Tensor, mode.from_tensor, batch)
    state.model.register_forward_pre_hook(trace.enter)
    state.model.register_forward_hook(trace.leave)
    with mode, LikeGPU():
        for p in state.model.parameters():
            p.grad = torch.zeros_like(p)
        state.optimizer.step()  # creates the optimiser's state
        state.optimizer.zero_grad()
        with trace:
            step(state, batch)
    return trace.ops


def fused(ops: Sequence[Op]) -> list[Op]:
    """Return the kernels after fusion; a group reads what comes from outside it, and writes what is read outside it.

    The level of an operator is the largest number of operators that cannot be fused on a path of data to it. Fusible operators of
    one level that pass data to one another are a group. So no path of data leaves a group and returns to it.
    """
    writer, level, group, sources, readers = {}, [], list(range(len(ops))), [], defaultdict(set)

    def root(i: int) -> int:
        while group[i] != i:
            i = group[i]
        return i

    for i, op in enumerate(ops):
        sources.append({tensor: writer.get(tensor[0]) for tensor in op.reads})
        before = {j for j in sources[i].values() if j is not None}
        level.append(max((level[j] + (not ops[j].fusible) for j in before), default=0))
        for j in before:
            readers[j].add(i)
            if op.fusible and ops[j].fusible and level[j] == level[i]:
                group[root(j)] = root(i)
        writer.update({tensor[0]: i for tensor in op.writes})
    kernels = {}
    for i, op in enumerate(ops):
        kernel = kernels.setdefault(root(i), Op("group", op.part, 0, {}, {}) if op.fusible else op)
        if not op.fusible:
            continue
        kernel.reads |= {(*t, j): op.reads[t] for t, j in sources[i].items() if j is None or root(j) != root(i)}
        if any(root(j) != root(i) for j in readers[i]):
            kernel.writes |= {(*tensor, i): size for tensor, size in op.writes.items()}
    return list(kernels.values())


def summed(kernels: Sequence[Op], rates: Mapping[str, float]) -> dict[str, float]:
    """Return the ms of the step, of its parts and of data movement, and "products", those of its products at full rate."""
    found = defaultdict(float)
    for op in kernels:
        kind = "products" if op.kind in ("matmul", "attention") else "depthwise" if op.kind == "depthwise" else "memory"
        for name in ("step", op.part, kind):
            seconds = op.work / rates["matmul"] if name == "products" else op.seconds(rates)
            found[name] += 1000 * seconds
    return found


def predict(arguments: argparse.Namespace) -> Iterator[list[Row]]:
    """Yield the figures of each network, device and mode, and the time with each shortcut relative to that without."""
    matmul, devices = 1e12 * arguments.matmul_tflops, {name: COPY_SHARE * copied for name, copied in COPY.items()}
    devices = {"custom": 1e9 * arguments.copy_gbs} if arguments.copy_gbs else devices
    rates = {"matmul": matmul, "attention": ATTENTION_SHARE * matmul, "depthwise": DEPTHWISE_SHARE * FP32}
    batch = 4 if arguments.quick else arguments.batch_size
    how = {"size": 64 if arguments.quick else 224, "precision": "bf16"}
    for arch in arguments.arch.split(","):
        plain, reused, trimmed = (recorded(arch, batch, reuse=r, trim=t, **how) for r, t in ((0, 0), (1, 0), (0, 1)))
        found: list[Row] = []
        modes, shorter = {"eager": plain, "compiled": fused(plain)}, {"reuse": fused(reused), "trim": fused(trimmed)}
        for (device, speed), (mode, kernels) in product(devices.items(), modes.items()):
            end, ms = f"{arch}_{device}_{mode}", summed(kernels, rates | {"copy": speed})
            note = f"{len(kernels)} kernels, {1e3 * LAUNCH_SECONDS * len(kernels):.1f} ms of the host"
            found.append(row(f"images_per_second_{end}", [1000 * batch / ms["step"]], "images/s", note=note))
            found += [row(f"ms_{part}_{end}", [ms[part]], "ms") for part in ("attack", "training", "update")]
            kinds = {"matmul": "products", "memory": "memory", "depthwise": "depthwise"}
            found += [row(f"{kind}_share_{end}", [ms[name] / ms["step"]], "of step") for kind, name in kinds.items()]
            for what, short in shorter.items() if mode == "compiled" else ():
                ratio = summed(short, rates | {"copy": speed})["step"] / ms["step"]
                found.append(row(f"{what}_ratio_{end}", [ratio], "of step"))
        yield found


def cpu_seconds(op: Op) -> float:
    """Return the median CPU seconds of three calls of an operator alone, with new memory for each result."""

    def real(t: Tensor) -> Tensor:
        memory = torch.ones(t.untyped_storage().nbytes() // t.itemsize, dtype=t.dtype)
        return memory.as_strided(t.shape, t.stride(), t.storage_offset())

    (args, kwargs), kept = tree_map_only(Tensor, real, op.call[1:3]), []
    with torch.no_grad():
        calls = [timed(lambda: kept.append(op.call[0](*args, **kwargs)), torch.device("cpu")) for _ in range(4)]
    return median(call.cpu for call in calls[1:])


def measured_rates(ops: Sequence[Op]) -> dict[str, float]:
    """Return the rate of each kind, measured on its operators with the most work, each at its own shape."""
    alike = defaultdict(lambda: defaultdict(list))
    for op in ops:
        kind = op.kind if op.kind in ON_CPU else "copy"
        alike[kind][f"{op.call[0]} {op.work} {sorted(op.reads.values())}"].append(op)
    rates = {}
    for kind, shapes in alike.items():
        largest = sorted(shapes.values(), key=lambda same: -sum(op.work for op in same))[:SAMPLED]
        work = sum(op.work for same in largest for op in same)
        rates[kind] = work / sum(len(same) * cpu_seconds(same[0]) for same in largest)
    print({kind: f"{rate / 1e9:.3g} G/s" for kind, rate in rates.items()}, file=sys.stderr)
    return rates


def images_again(state: TrainState, step: Callable[[], object]) -> int:
    """Take one step and return how many images pass through the trained network a second time."""
    passes, network = [], state.parallel

    def counted(x: Tensor) -> Tensor:
        passes.append(len(x))
        return network(x)

    state.parallel = counted
    step()
    state.parallel = network
    return sum(passes[1:])


def validate(arguments: argparse.Namespace) -> Iterator[list[Row]]:
    """Compare the prediction with a measured float32 step on one CPU core; rates and step are measured in turn."""
    torch.set_num_threads(1)  # CPU seconds of one thread, which other processes disturb little
    quick = arguments.quick
    how = {"size": 64 if quick else 224, "precision": "fp32", "reuse": True, "trim": True}
    for arch in arguments.arch.split(","):
        *given, step = prepared(arch, 2 if quick else 8, **how)
        again = images_again(given[0], lambda: step(*given))  # noqa: B023 (called at once)
        ops, pairs = recorded(arch, 2 if quick else 8, again=again, **how), []
        for _ in range(1 if quick else 5):
            predicted = summed(ops, measured_rates(ops))["step"] / 1000
            pairs.append((predicted, timed(lambda: step(*given), torch.device("cpu")).cpu))  # noqa: B023
        ratios = [predicted / measured for predicted, measured in pairs]
        note = f"a step takes {median(measured for _, measured in pairs):.3g} CPU s"
        yield [
            row(f"predicted_over_measured_{arch}", ratios, "times", note=note),
            row(f"prediction_error_{arch}", [abs(median(ratios) - 1)], "", "<= 0.25", counts=not quick),
        ]


def parser() -> argparse.ArgumentParser:
    parser = options(__doc__.split("\n")[0])
    parser.add_argument("--arch", help="names in utils_architecture, comma-separated")
    parser.add_argument("--batch-size", type=int, default=80)
    parser.add_argument("--matmul-tflops", type=float, default=MATMUL_SHARE * BF16 / 1e12, help="of large products")
    parser.add_argument("--copy-gbs", type=float, help="of another device: GB/s read and written by a copy")
    parser.add_argument("--validate", action="store_true", help="compare with a measured step on this CPU")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    arguments = parser().parse_args(argv)
    more = "" if arguments.quick or arguments.validate else ",vit_b,convnext_base"
    arguments.arch = arguments.arch or f"vit_s,convnext_tiny{more}"
    return arguments


if __name__ == "__main__":
    given = parse(sys.argv[1:])
    sys.exit(main(validate if given.validate else predict, given))
