"""Benchmark of a step of adversarial training: this implementation against the published design.

    python -m benchmarks.train_step --arch convnext_tiny [--quick] [--json FILE]

Each arm is a form of this implementation, measured with and without reuse of the attack's last forward pass, and without attack.
All of them and the published design take turns, so ratios compare steps that follow each other. APGD with 2 steps at Linf 4/255,
AdamW, EMA, and ConvStem where available. Precision on a CPU: float32; on a GPU: float16 (published) and bfloat16 (this
implementation, see `--precision`), both with cuDNN's autotuning. FLOPs include the attack's passes. Figures are written after
each arm.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType

from attacks.gradients import under_attack
from attacks.losses import cross_entropy
from attacks.registry import build_attack, forward_equivalents
from benchmarks.harness import Row, Sample, main, matmul_rate, options, row, timed
from benchmarks.published_step import PublishedTraining
from common.errors import UserError
from common.flags import load_config
from common.precision import deterministic, float32_matmul
from common.processes import Processes
from data.loader import Batch
from training.build import build_state
from training.compiled import prepare_networks, wants_compiled
from training.config import COMPILE_MODES, TrainConfig
from training.efficiency import forward_flops, name_of, peak_flops
from training.state import TrainState
from training.step import autocast, on_device, optimizer_step, train_step
from utils_architecture import ARCHITECTURES

N_ITER = 2
GPU_ARMS, CPU_ARMS = "eager,compiled,compiled+trim", "eager,eager+trim"
BATCH = {"cuda": 80, "cpu": 8}
# Part of the free memory that the largest batch may take, and the step between tried batch sizes.
FILLED, GRAIN = 0.92, 16


@dataclass(frozen=True)
class Arm:
    """A form of this implementation, such as `compiled+trim`: how networks are compiled, and whether the last block is trimmed."""

    name: str

    @property
    def flags(self) -> list[str]:
        mode, _, trim = self.name.partition("+")
        if mode not in ("eager", "compiled", *COMPILE_MODES) or trim not in ("", "trim"):
            raise UserError(
                f"--arms: expected eager, compiled or a mode of training.compile, with or without +trim, got {self.name}."
            )
        compile = {"eager": "0", "compiled": "1"}.get(mode, mode)
        return [f"--training.compile={compile}", f"--training.trim_last_block={int(bool(trim))}"]

    @property
    def key(self) -> str:
        return self.name.replace("+", "_").replace("-", "_")


@dataclass(frozen=True)
class Setup:
    """What all arms of one network share."""

    arch: str
    batch_size: int
    size: int
    precision: str
    repeats: int
    processes: Processes

    @property
    def device(self) -> torch.device:
        return self.processes.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def config(self, arm: Arm, *flags: str) -> TrainConfig:
        """Return the training flags of an arm."""
        stem = self.arch in ARCHITECTURES and ARCHITECTURES[self.arch].conv_stem is not None
        return load_config(
            TrainConfig,
            [
                f"--model.arch={self.arch}",
                f"--model.not_original={int(stem)}",
                *("--model.pretrained=0", "--model.add_normalization=0", "--model.model_ema=1"),
                f"--resolution.min_res={self.size}",
                f"--resolution.max_res={self.size}",
                *("--data.train_dataset=none", "--data.val_dataset=none", "--data.num_workers=0", "--data.in_memory=0"),
                f"--training.batch_size={self.batch_size}",
                f"--training.precision={self.precision}",
                "--training.reuse_forward=1",
                *("--adv.attack=apgd", f"--adv.n_iter={N_ITER}"),
                *arm.flags,
                *flags,
            ],
        )

    def batch(self) -> Batch:
        """Return random images and labels, on a GPU's host in pinned memory."""
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(self.batch_size, 3, self.size, self.size, generator=generator)
        y = torch.randint(0, 1000, (self.batch_size,), generator=generator)
        x, y = (x.pin_memory(), y.pin_memory()) if self.on_gpu else (x, y)
        return Batch(x=x, y=y, index=y, failures=[])


@dataclass(frozen=True)
class Measured:
    """Samples of each kind of step in measured order, and peak GPU memory of the step in bytes (0 on a CPU)."""

    samples: dict[str, list[Sample]]
    memory: dict[str, int]


def measure_kinds(
    kinds: dict[str, Callable[[], object]], device: torch.device, *, repeats: int, times: int
) -> Measured:
    """Take turns, `times` consecutive steps of each kind; the first round is a warm-up and not counted."""
    samples: dict[str, list[Sample]] = {name: [] for name in kinds}
    memory = dict.fromkeys(kinds, 0)
    on_gpu = device.type == "cuda"
    for turn in range(repeats + 1):
        for name, step in kinds.items():
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device) if on_gpu else 0
            sample = timed(step, device, times=times)
            if on_gpu:
                memory[name] = torch.cuda.max_memory_allocated(device) - before
            if turn:
                samples[name].append(sample)
            print(f"{name}: {sample.wall:.3f} s, {sample.cpu:.3f} CPU s", file=sys.stderr)
    return Measured(samples, memory)


def own_step(state: TrainState, config: TrainConfig, processes: Processes, batch: Batch, *, reuse: bool) -> None:
    """Take one step of this implementation."""
    state.reuses_forward = reuse
    attack, eps = build_attack(config.adv), config.adv.eps
    train_step(state, [batch], config=config, processes=processes, attack=attack, mixup=None, lr=1e-5, eps=eps)


def parts(setup: Setup, state: TrainState, config: TrainConfig, batch: Batch) -> dict[str, list[float]]:
    """Return the milliseconds of each part of a step that does not reuse a forward pass, measured separately."""
    device, adv = setup.device, config.adv
    x, y = on_device(batch, config, device)
    run = build_attack(adv)

    def attack_forward() -> None:
        with under_attack(state.attacked), autocast(device, setup.precision):
            for _ in range(adv.n_iter):
                state.attacked(x.detach().requires_grad_())
            with torch.no_grad():
                state.attacked(x)

    def attack() -> None:
        with autocast(device, setup.precision):
            run(state.attacked, x, y, eps=adv.eps)

    def forward() -> Tensor:
        state.train_mode()
        with autocast(device, setup.precision):
            return cross_entropy(state.parallel(x), y).mean()

    actions = {
        "transfer": lambda: on_device(batch, config, device),
        "attack_forward": attack_forward,
        "attack": attack,
        "forward": forward,
        "forward_backward": lambda: state.scaler.scale(forward()).backward(),
        "optimizer": lambda: optimizer_step(state, grad_clip=0.0),
        "ema": lambda: state.ema.update(state.model, 1),
    }
    found: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(setup.repeats):
        for name, action in actions.items():
            found[name].append(1000 * timed(action, device).wall)
    for both, first, second in (
        ("attack", "attack_forward", "attack_backward"),
        ("forward_backward", "forward", "backward"),
    ):
        found[second] = [max(a - b, 0.0) for a, b in zip(found.pop(both), found[first])]
    return found


def host_gap(step: Callable[[], object], device: torch.device) -> list[float] | None:
    """Return the share of three steps in which the GPU runs no kernel; None on a CPU."""
    if device.type != "cuda":
        return None
    shares = []
    for _ in range(3):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
            seconds = timed(step, device).wall
        # Kernels and copies follow each other on one stream; a named region of the step would count them again.
        there = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
        spans = [event.time_range.elapsed_us() for event in there if not event.is_user_annotation]
        shares.append(max(0.0, 1 - sum(spans) / 1e6 / seconds))
    return shares


def measure_arm(setup: Setup, arm: Arm, *, suffix: str) -> Iterator[list[Row]]:
    """Measure the steps of one arm, taking turns with the published design, and then its gaps."""
    config, processes, device = setup.config(arm), setup.processes, setup.device
    clean = replace(config, adv=replace(config.adv, attack="none"))
    state, batch = build_state(config, processes), setup.batch()
    published = PublishedTraining(
        build_state(setup.config(Arm("eager")), processes).model, arch=setup.arch, eps=config.adv.eps, n_iter=N_ITER
    )
    prepared = timed(lambda: prepare_networks(state, config, processes, size=setup.size), device).wall
    if wants_compiled(config, processes) and state.attacked is state.model:
        name = f"images_per_second_{arm.key}_{setup.arch}{suffix}"
        yield [row(name, None, "images/s", note="cannot be compiled, see above")]
        return

    def published_step() -> None:
        published.step(batch.x, batch.y)
        published.free()

    step = partial(own_step, state, config, processes, batch)
    kinds = {"published": published_step, arm.key: partial(step, reuse=False)}
    if state.reuses_forward:
        kinds[f"{arm.key}_reuse"] = partial(step, reuse=True)
    kinds[f"{arm.key}_clean"] = partial(own_step, state, clean, processes, batch, reuse=False)
    measured = measure_kinds(kinds, device, repeats=setup.repeats, times=5 if setup.on_gpu else 1)
    part_ms = parts(setup, state, config, batch)
    flops = {
        kind: setup.batch_size * forward_flops(state.model, setup.size) * forward_equivalents(config.adv, reused=reused)
        for kind, reused in ((arm.key, False), (f"{arm.key}_reuse", True))
    }
    rate = matmul_rate(device, setup.precision)
    yield rows(setup, arm, measured, part_ms, flops, rate, prepared=prepared, suffix=suffix)
    gap, name = host_gap(kinds[arm.key], device), f"host_gap_{arm.key}_{setup.arch}{suffix}"
    yield [row(name, gap, "of the step without a kernel", note="" if setup.on_gpu else "GPU only")]


def rows(
    setup: Setup,
    arm: Arm,
    measured: Measured,
    part_ms: dict[str, list[float]],
    flops: dict[str, float],
    rate: float,
    *,
    prepared: float,
    suffix: str,
) -> list[Row]:
    """Return the rows of an arm.

    Args:
        flops: FLOPs of a step of each kind.
        rate: FLOP/s of this machine's matrix products.
    """
    wall = {name: [s.wall for s in taken] for name, taken in measured.samples.items()}
    what = f"batch {setup.batch_size}, {setup.size} px, {setup.precision}"
    what += "" if setup.on_gpu else f", {torch.get_num_threads()} threads"
    peak = peak_flops(name_of(setup.device), setup.precision)
    found: list[Row] = []

    def add(name: str, values: Sequence[float] | None, unit: str, target: str | None = None, note: str = "") -> None:
        found.append(row(f"{name}_{setup.arch}{suffix}", values, unit, target if setup.on_gpu else None, note=note))

    def ratios(above: str, below: str) -> list[float]:
        return [a / b for a, b in zip(wall[above], wall[below])]

    for kind, seconds in wall.items():
        name = f"{kind}_{arm.key}" if kind == "published" else kind
        cpu = median(s.cpu for s in measured.samples[kind])
        note = f"{what}; {median(seconds):.3g} s, {cpu:.3g} CPU s per step"
        add(f"images_per_second_{name}", [setup.batch_size / s for s in seconds], "images/s", note=note)
        if setup.on_gpu:
            add(
                f"peak_memory_{name}",
                [measured.memory[kind] / 2**20],
                "MiB",
                note="per step, without weights and optimiser",
            )
        if kind in flops:
            add(f"time_ratio_{kind}", ratios(kind, "published"), "of published", "<= 0.4")
            add(f"matmul_share_{kind}", [flops[kind] / rate / s for s in seconds], "of this machine's matmul rate")
            if peak:
                add(f"mfu_{kind}", [flops[kind] / peak / s for s in seconds], "of the data sheet's rate")
    add(f"adv_over_clean_{arm.key}", ratios(arm.key, f"{arm.key}_clean"), "times", "<= 3.0")
    if f"{arm.key}_reuse" in wall:
        add(f"reuse_ratio_{arm.key}", ratios(f"{arm.key}_reuse", arm.key), "of separate forward passes")
    for part, values in part_ms.items():
        add(f"ms_{part}_{arm.key}", values, "ms")
    add(f"prepare_seconds_{arm.key}", [prepared], "s", note="compilation, or loading it from the cache")
    return found


def largest_batch(setup: Setup, arm: Arm) -> list[Row]:
    """Measure the step with the largest batch that fits, predicted from the memory of a step with `setup.batch_size`."""
    name = f"images_per_second_largest_batch_{arm.key}_{setup.arch}"
    if not setup.on_gpu:
        return [row(name, None, "images/s", note="needs a GPU")]
    batch_size, device = setup.batch_size, setup.device
    probe = measure_step(setup, arm, repeats=1)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    batch_size = int(FILLED * free / (probe.memory["step"] / setup.batch_size)) // GRAIN * GRAIN
    while batch_size > setup.batch_size:
        try:
            found = measure_step(replace(setup, batch_size=batch_size), arm, repeats=3)
        except torch.OutOfMemoryError:
            batch_size = int(0.9 * batch_size) // GRAIN * GRAIN
            continue
        note = f"batch {batch_size}, {found.memory['step'] / 2**30:.1f} GiB per step"
        return [row(name, [batch_size / s.wall for s in found.samples["step"]], "images/s", note=note)]
    return [row(name, None, "images/s", note=f"no batch above {setup.batch_size} fits")]


def measure_step(setup: Setup, arm: Arm, *, repeats: int) -> Measured:
    """Measure the step of an arm alone."""
    gc.collect()
    torch.cuda.empty_cache()
    config = setup.config(arm)
    state = build_state(config, setup.processes)
    prepare_networks(state, config, setup.processes, size=setup.size)
    step = partial(own_step, state, config, setup.processes, setup.batch(), reuse=False)
    return measure_kinds({"step": step}, setup.device, repeats=repeats, times=3)


def measure(arguments: argparse.Namespace) -> Any:
    """Yield the rows of each arm, for every architecture and batch size."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    processes = Processes.alone()
    kind, quick = processes.device.type, arguments.quick
    arms = (arguments.arms or (GPU_ARMS if kind == "cuda" else CPU_ARMS)).split(",")
    sizes = (arguments.batch_size or ("4" if quick else str(BATCH[kind]))).split(",")
    repeats = arguments.repeats or (1 if quick else 6 if kind == "cuda" else 5)
    precision = arguments.precision or ("bf16" if kind == "cuda" else "fp32")
    for arch in arguments.arch.split(","):
        for number, batch_size in enumerate(sizes):
            first = BATCH[kind] if batch_size == "largest" else int(batch_size)
            setup = Setup(arch, first, 64 if quick else 224, precision, repeats, processes)
            for arm in map(Arm, arms):
                with float32_matmul(tf32=precision == "tf32"), deterministic(False):
                    if batch_size == "largest":
                        yield largest_batch(setup, arm)
                    else:
                        yield from measure_arm(setup, arm, suffix=f"_batch{batch_size}" if number else "")
                gc.collect()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = options(__doc__.split("\n")[0])
    parser.add_argument("--arch", default="convnext_tiny", help="names in utils_architecture, comma-separated")
    parser.add_argument(
        "--batch-size",
        help="one or several, comma-separated, or `largest`: what fits on the GPU (default 80 on a GPU, 8 on a CPU)",
    )
    parser.add_argument("--precision", choices=("fp32", "tf32", "fp16", "bf16"), help="as training.precision")
    parser.add_argument(
        "--arms",
        help=f"forms to measure, comma-separated: eager, compiled or a mode of training.compile, with or without +trim "
        f"(default {GPU_ARMS} on a GPU, {CPU_ARMS} on a CPU)",
    )
    parser.add_argument("--threads", type=int, help="PyTorch threads on a CPU")
    parser.add_argument("--repeats", type=int, help="rounds (default 6 on a GPU, 5 on a CPU, 1 with --quick)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(measure, parse(sys.argv[1:])))
