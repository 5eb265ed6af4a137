"""Notes at the start of a run: flags without effect, and flags with values that are probably a mistake."""

from __future__ import annotations

import math

from attacks.norms import odd_radius
from training.config import TrainConfig
from training.idle import idle_flags
from training.schedule import COSINE_END, eps_at

IMAGENET_CLASSES = 1000  # classes of timm's pretrained heads
INITIAL_SHARE = 0.1  # share of the initial weights in the EMA at the end of the run; a larger one is reported


def notes_for(config: TrainConfig, device_type: str, *, global_batch: int, steps: int) -> list[str]:
    """Return sentences for the user.

    Args:
        config: as `TrainConfig.on` returned it.
        global_batch: images per step, over all processes.
        steps: steps of the whole run.
    """
    idle, given, precision = idle_flags(config), set(config.given), config.training.precision
    notes = []
    if forgotten := forgotten_attack(config):
        given = {name for name in given if not name.startswith("adv.")}
        notes.append(forgotten)
    adv = config.adv
    if adv.attack != "none" and (odd := odd_radius(adv.norm, adv.eps, size=config.resolution.max_res)):
        notes.append(f"adv.eps: {odd}")
    notes += [f"{name} has no effect without {idle[name]}" for name in sorted(idle.keys() & given)]
    if "training.precision" not in given:
        if precision != config.on(device_type).training.precision:
            notes.append(f"training.precision: {precision}, as at the start of this run")
        elif device_type == "cpu":
            notes.append("training.precision: fp32, because fp16, the default for GPUs, is slow on a CPU")
    if config.training.eval_only:
        notes += _on_random(config)
    else:
        notes += [
            *_on_batch(config, global_batch),
            *_on_average(config, steps),
            *_on_schedules(config),
            *_on_frozen(config),
        ]
        if config.adv.attack != "none" and not config.validation.adv_n_ex:
            notes.append(
                "validation.adv_n_ex=0: no best weights are saved, because clean accuracy does not show which ones are best"
            )
    return notes


def forgotten_attack(config: TrainConfig) -> str | None:
    """Return a sentence if attack flags are given but no attack is chosen, unless the user typed adv.attack=none."""
    declined = "adv.attack" in config.typed
    # A file with adv.attack=none may be a recipe for clean training. Then only flags from the command line count.
    given = sorted(
        name for name in (config.typed if "adv.attack" in config.given else config.given) if name[:4] == "adv."
    )
    if not given or config.adv.attack != "none" or declined or config.training.eval_only:
        return None
    return (
        f"adv.attack is none, so this run trains on clean images although it gets {', '.join(given)}; for adversarial "
        "training give --adv.attack=apgd, for clean training give --adv.attack=none"
    )


def _on_batch(config: TrainConfig, global_batch: int) -> list[str]:
    meant, training = config.training.global_batch, config.training
    if meant in (0, global_batch):
        return []
    accum, rest = divmod(meant, training.batch_size * config.dist.processes)
    remedies = [f"--training.grad_accum={accum}"] if not rest else []
    remedies.append(f"a proportional learning rate, --lr.lr={config.lr.lr * global_batch / meant:.3g}")
    return [
        f"training.global_batch: the learning rate is meant for {meant} images per step, but this run uses {global_batch}; give "
        + ", or ".join(remedies)
    ]


def _on_average(config: TrainConfig, steps: int) -> list[str]:
    m = config.model
    if not m.model_ema or m.ema_warmup or (share := m.ema_decay**steps) <= INITIAL_SHARE:
        return []
    rest = 1 - INITIAL_SHARE ** (1 / steps)
    unit = 10.0 ** (math.floor(math.log10(rest)) - 1)
    decay = 1 - math.ceil(rest / unit) * unit  # two digits of 1 - decay
    return [
        f"model.ema_decay: after the run's {steps} steps {share:.0%} of the EMA are still the initial weights; give "
        f"--model.ema_warmup=1, or --model.ema_decay={decay:.10g}"
    ]


def _on_schedules(config: TrainConfig) -> list[str]:
    lr, adv, epochs, notes = config.lr, config.adv, config.training.epochs, []
    if lr.lr_schedule_type == "cosine" and lr.lr < COSINE_END:
        notes.append(
            f"lr.lr: {lr.lr:.3g} is below {COSINE_END:.3g}, the fixed final value of lr.lr_schedule_type=cosine, so the "
            "learning rate rises to that value; --lr.lr_schedule_type=cyclic ends at 0"
        )
    if adv.attack != "none" and adv.eps_warmup_epochs > epochs:
        end = eps_at(epochs, eps=adv.eps, warmup_epochs=adv.eps_warmup_epochs)
        notes.append(
            f"adv.eps_warmup_epochs: the radius reaches only {end:.3g} in the run's {epochs} epochs, not adv.eps={adv.eps:.3g}; "
            f"give at most {epochs}"
        )
    return notes


def _on_frozen(config: TrainConfig) -> list[str]:
    m, head_only = config.model, config.lr.body_factor == 0
    if config.training.resume not in ("auto", "none"):
        return []
    frozen_stem, frozen_head = head_only or (m.freeze_some and not m.early), m.freeze_some and m.early
    new_head = m.new_head if m.ckpt_path else m.num_classes != IMAGENET_CLASSES
    body = not m.ckpt_path and not m.pretrained
    random = body or (new_head and frozen_head) or (not m.ckpt_path and m.not_original and frozen_stem)
    if not random or not (head_only or m.freeze_some):
        return []
    flag = "lr.body_factor=0" if head_only else "model.freeze_some=1"
    return [
        f"{flag}: some frozen weights are random, because no trained weights are given for them; give model.ckpt_path"
        + " with a file that includes the head" * new_head * (not body)
    ]


def _on_random(config: TrainConfig) -> list[str]:
    """Return a note if a run that only validates measures a network with random weights."""
    m = config.model
    random = m.new_head if m.ckpt_path else not m.pretrained or m.num_classes != IMAGENET_CLASSES or m.not_original
    if not random or config.training.resume not in ("auto", "none"):
        return []
    what = "model.new_head=1" if m.ckpt_path else "no model.ckpt_path"
    return [f"training.eval_only=1: the validated network has random weights ({what})"]
