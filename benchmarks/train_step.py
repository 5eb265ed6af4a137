"""Benchmark of a step of adversarial training: this implementation against the published design.

    python -m benchmarks.train_step --arch convnext_tiny [--quick] [--json FILE]

The steps are interleaved: the published design ("published"), this implementation ("ours") with and without reuse of the
attack's last forward pass, and this implementation without attack ("clean"). APGD with 2 steps at Linf 4/255, AdamW, EMA, and
ConvStem where available. Precision on a CPU: float32; on a GPU: float16 (published), bfloat16 (this implementation; see
`--precision`), both with cuDNN's autotuning. Run one command per architecture. FLOPs include the attack's passes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from attacks.losses import cross_entropy
from attacks.registry import build_attack
from benchmarks.harness import Row, main, options, row
from benchmarks.published_step import PublishedTraining
from common.errors import UserError
from common.flags import load_config
from common.precision import deterministic, float32_matmul
from common.processes import Processes
from data.loader import Batch
from data.prefetch import finish_augmentation
from training.build import build_state
from training.compiled import prepare_networks, wants_compiled
from training.config import TrainConfig
from training.shortcuts import asked_for, trim_last_block
from training.state import TrainState
from training.step import autocast, image_dtype, optimizer_step, train_step
from utils_architecture import ARCHITECTURES

N_ITER = 2
CPU_TARGETS = ("convnext_tiny", "vit_s")
MATMUL_SHARE = {"vit_b": 0.38, "vit_s": 0.28, "convnext_base": 0.22, "convnext_tiny": 0.14}


def forwards(*, reused: bool) -> int:
    """Return the work of a step in forward passes.

    The attack: n + 1 forwards and n input gradients. Training: a forward, possibly the attack's last, and a backward (two)."""
    return (N_ITER + 1) + N_ITER + 3 - reused


@dataclass(frozen=True)
class Sample:
    """Wall seconds and CPU seconds of one step in this process."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Measured:
    """Samples of each arm in measured order, and peak GPU memory of its step in bytes (0 on a CPU)."""

    samples: dict[str, list[Sample]]
    memory: dict[str, int]


def config_for(
    arguments: argparse.Namespace, *, attack: str, batch_size: int, size: int, precision: str
) -> TrainConfig:
    """Return the training flags of this implementation."""
    stem = arguments.arch in ARCHITECTURES and ARCHITECTURES[arguments.arch].conv_stem is not None
    return load_config(
        TrainConfig,
        [
            f"--model.arch={arguments.arch}",
            f"--model.not_original={int(stem)}",
            "--model.pretrained=0",
            "--model.add_normalization=0",
            "--model.model_ema=1",
            f"--resolution.min_res={size}",
            f"--resolution.max_res={size}",
            *("--data.train_dataset=none", "--data.val_dataset=none", "--data.num_workers=0", "--data.in_memory=0"),
            f"--training.batch_size={batch_size}",
            f"--training.precision={precision}",
            f"--training.compile={arguments.compile}",
            "--training.reuse_forward=1",
            "--training.trim_last_block=0",
            f"--adv.attack={attack}",
            f"--adv.n_iter={N_ITER}",
        ],
    )


def wait(device: torch.device) -> None:
    """Wait until the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(action: Callable[[], object], device: torch.device, *, times: int = 1) -> Sample:
    """Return the seconds per `action`, averaged over `times` consecutive calls."""
    wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        action()
    wait(device)
    return Sample((time.perf_counter() - wall) / times, (time.process_time() - cpu) / times)


def measure_arms(arms: dict[str, Callable[[], object]], device: torch.device, *, repeats: int, times: int) -> Measured:
    """Interleave the steps of all arms, `times` consecutive steps each; the first round is a warm-up and not counted."""
    samples: dict[str, list[Sample]] = {name: [] for name in arms}
    memory = dict.fromkeys(arms, 0)
    on_gpu = device.type == "cuda"
    for turn in range(repeats + 1):
        for name, step in arms.items():
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


def parts(
    state: TrainState, config: TrainConfig, processes: Processes, batch: Batch, *, repeats: int
) -> dict[str, list[float]]:
    """Return the milliseconds of each part of this implementation's step, measured separately, `repeats` times."""
    device, precision = processes.device, config.training.precision

    def images() -> Tensor:
        return finish_augmentation(batch, device=device, dtype=image_dtype(precision), channels_last=True)

    x_there, y_there = images(), batch.y.to(device)

    known = torch.zeros(len(y_there), config.model.num_classes, device=device)
    run = build_attack(config.adv)
    evaluate_last = (lambda x: known) if state.reuses_forward else None  # counted in the part forward_backward

    def attack() -> None:
        with autocast(device, precision):
            run(state.attacked, x_there, y_there, eps=config.adv.eps, evaluate_last=evaluate_last)

    def train() -> None:
        with autocast(device, precision):
            loss = cross_entropy(state.parallel(x_there), y_there).mean()
        state.scaler.scale(loss).backward()

    found: dict[str, list[float]] = {
        name: [] for name in ("transfer", "attack", "forward_backward", "optimizer", "ema")
    }
    state.model.train()
    for _ in range(repeats):
        actions = (
            images,
            attack,
            train,
            lambda: optimizer_step(state, grad_clip=0.0),
            lambda: state.ema.update(state.model, 1),
        )
        for name, action in zip(found, actions):
            found[name].append(1000 * timed(action, device).wall)
    return found


def matmul_rate(device: torch.device, precision: str, *, size: int) -> float:
    """Return the FLOP/s of the fastest of five square matrix products of `size`, in the precision of the step."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * size**3 / min(timed(lambda: a @ b, device).wall for _ in range(5))


def forward_flops(state: TrainState, size: int) -> float:
    """Return the FLOPs of one forward pass of one image (matrix products and convolutions; a multiply-add counts as two)."""
    parameter = next(state.model.parameters())
    x = torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        state.model.eval()(x)
    return counter.get_total_flops()


def measure_batch(arguments: argparse.Namespace, batch_size: int, *, suffix: str) -> list[Row]:
    """Measure all figures for one batch size."""
    processes = Processes.alone()
    device = processes.device
    on_gpu = device.type == "cuda"
    size = 64 if arguments.quick else 224
    precision = arguments.precision or ("bf16" if on_gpu else "fp32")
    config = config_for(arguments, attack="apgd", batch_size=batch_size, size=size, precision=precision)
    clean = replace(config, adv=replace(config.adv, attack="none"))
    state = build_state(config, processes)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch_size, 3, size, size, generator=generator)
    y = torch.randint(0, config.model.num_classes, (batch_size,), generator=generator)
    if on_gpu:
        x, y = x.pin_memory(), y.pin_memory()
    batch = Batch(x=x, y=y, index=y, failures=[])
    published = PublishedTraining(state.model, arch=arguments.arch, eps=config.adv.eps, n_iter=N_ITER)
    if asked_for(arguments.trim_last_block, device):  # not in the published network, which is a copy
        trim_last_block(state.model)
    begin = time.perf_counter()
    prepare_networks(state, config, processes, size=size)
    prepared = time.perf_counter() - begin
    if wants_compiled(config, processes) and state.attacked is state.model:
        raise UserError(
            "training.compile: this machine cannot compile (see above). Use --compile=0 to measure without."
        )

    possible = state.reuses_forward
    reuses = possible and asked_for(arguments.reuse_forward, device)

    def own_step(flags: TrainConfig, *, reuse: bool) -> Callable[[], object]:
        def step() -> None:
            state.reuses_forward = reuse
            train_step(
                state,
                [batch],
                config=flags,
                processes=processes,
                attack=build_attack(flags.adv),
                mixup=None,
                lr=1e-5,
                eps=flags.adv.eps,
            )

        return step

    def published_step() -> None:
        published.step(x, y)
        published.free()

    arms = {"published": published_step, "ours": own_step(config, reuse=reuses), "clean": own_step(clean, reuse=False)}
    if possible:  # the opposite setting
        arms["own_forward" if reuses else "reused_forward"] = own_step(config, reuse=not reuses)
    repeats = arguments.repeats or (3 if arguments.quick else 10 if on_gpu else 5)
    measured = measure_arms(arms, device, repeats=repeats, times=5 if on_gpu else 1)
    again = images_again(state, arms["ours"])
    part_ms = parts(state, config, processes, batch, repeats=repeats)
    passes = forwards(reused=reuses)
    flops = forward_flops(state, size) * batch_size * passes
    rate = matmul_rate(device, precision, size=8192 if on_gpu else 2048)
    return rows(
        arguments, config, measured, part_ms, flops / rate, passes=passes, again=again, suffix=suffix, prepared=prepared
    )


def images_again(state: TrainState, step: Callable[[], object]) -> int:
    """Take one more step and return how many images pass through the trained network a second time."""
    passes, network = [], state.parallel

    def counted(x: Tensor) -> Tensor:
        passes.append(len(x))
        return network(x)

    state.parallel = counted
    step()
    state.parallel = network
    return sum(passes[1:])


def rows(
    arguments: argparse.Namespace,
    config: TrainConfig,
    measured: Measured,
    part_ms: dict[str, list[float]],
    ideal_seconds: float,
    *,
    passes: int,
    again: int,
    suffix: str,
    prepared: float,
) -> list[Row]:
    """Return the rows; ratios compare consecutive steps. `ideal_seconds`: time of a step's `passes` at the matmul rate."""
    on_gpu = torch.cuda.is_available()
    counts = not arguments.quick and not suffix
    wall = {name: [s.wall for s in taken] for name, taken in measured.samples.items()}
    cpu = {name: [s.cpu for s in taken] for name, taken in measured.samples.items()}
    size, batch_size = config.resolution.max_res, config.training.batch_size
    compiled = (
        "compiled" if config.training.compile == "1" or (on_gpu and config.training.compile == "auto") else "eager"
    )
    what = f"batch {batch_size}, {size} px, {config.training.precision}, {compiled}"
    if not on_gpu:
        what += f", {torch.get_num_threads()} threads"
    whole = median(wall["ours"])

    def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
        return [a / b for a, b in zip(above, below)]

    def figure(kind: str, values: Sequence[float] | None, unit: str, target: str | None = None, note: str = "") -> Row:
        checked = counts and (kind != "time_ratio" or (arguments.arch in CPU_TARGETS and batch_size == 8))
        return row(f"{kind}_{arguments.arch}{suffix}", values, unit, target, note=note, counts=checked)

    reused, own = ("ours", "own_forward") if "own_forward" in wall else ("reused_forward", "ours")
    share = MATMUL_SHARE.get(arguments.arch)
    small = [(a + b) / 1000 / whole for a, b in zip(part_ms["optimizer"], part_ms["ema"])]
    memory = measured.memory if on_gpu else {}
    memory_ratio = [memory["ours"] / memory["published"]] if on_gpu else None
    found = [
        figure(
            "time_ratio", ratios(wall["ours"], wall["published"]), "of published", None if on_gpu else "<= 0.82", what
        ),
        figure("cpu_time_ratio", ratios(cpu["ours"], cpu["published"]), "of published", note="CPU seconds"),
        figure("speedup", ratios(wall["published"], wall["ours"]), "times", ">= 2.5" if on_gpu else None),
        figure("adv_over_clean", ratios(wall["ours"], wall["clean"]), "times", "<= 3.0" if on_gpu else None),
        figure(
            "matmul_share",
            [ideal_seconds / seconds for seconds in wall["ours"]],
            "of matmul rate",
            f">= {share}" if on_gpu and share else None,
            f"{passes} forward passes per step, and {again} images a second time",
        ),
        figure(
            "memory_ratio", memory_ratio, "of published", "<= 0.8" if on_gpu else None, "" if on_gpu else "GPU only"
        ),
        figure(
            "reuse_ratio",
            ratios(wall[reused], wall[own]) if reused in wall else None,
            "of own forward",
            note="training.reuse_forward=1 relative to 0",
        ),
        figure("ema_optimizer_share", small, "of step", "<= 0.04" if on_gpu else None),
    ]
    for arm, seconds in wall.items():
        note = f"{what if arm == 'ours' else arm}; {median(seconds):.3g} s, {median(cpu[arm]):.3g} CPU s per step"
        found.append(figure(f"images_per_second_{arm}", [batch_size / s for s in seconds], "images/s", note=note))
    found += [figure(f"ms_{part}", values, "ms") for part, values in part_ms.items()]
    found += [figure(f"peak_memory_{arm}", [used / 2**20], "MiB", note="per step") for arm, used in memory.items()]
    return [*found, figure("prepare_seconds", [prepared], "s", note="compilation, or loading it from the cache")]


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Measure all rows, for every architecture and batch size."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    on_gpu = torch.cuda.is_available()
    default = "80" if on_gpu else "8"
    sizes = [int(item) for item in (arguments.batch_size or ("4" if arguments.quick else default)).split(",")]
    found: list[Row] = []
    for arch in arguments.arch.split(","):
        one = argparse.Namespace(**{**vars(arguments), "arch": arch})
        for number, batch_size in enumerate(sizes):
            with float32_matmul(tf32=arguments.precision == "tf32"), deterministic(False):
                found += measure_batch(one, batch_size, suffix=f"_batch{batch_size}" if number else "")
    return found


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = options(__doc__.split("\n")[0])
    parser.add_argument("--arch", default="convnext_tiny", help="names in utils_architecture, comma-separated")
    parser.add_argument(
        "--batch-size", help="one or several, comma-separated (default 80 on a GPU, 8 on a CPU, 4 with --quick)"
    )
    parser.add_argument("--precision", choices=("fp32", "tf32", "fp16", "bf16"), help="as training.precision")
    parser.add_argument("--compile", choices=("auto", "0", "1"), default="auto", help="as training.compile")
    parser.add_argument("--reuse-forward", choices=("auto", "0", "1"), default="auto", help="as training.reuse_forward")
    parser.add_argument(
        "--trim-last-block", choices=("auto", "0", "1"), default="auto", help="as training.trim_last_block"
    )
    parser.add_argument("--threads", type=int, help="PyTorch threads on a CPU")
    parser.add_argument("--repeats", type=int, help="rounds (default 10 on a GPU, 5 on a CPU, 3 with --quick)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(measure, parse(sys.argv[1:])))
