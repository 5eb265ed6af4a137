"""Flags that have no effect in a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attacks.registry import ATTACKS, AttackEntry
from training.schedule import SCHEDULES


def idle_flags(config: Any) -> dict[str, str]:
    """Return the flags of a `training.config.TrainConfig` that have no effect in its run → the setting that they need.

    A given flag of these is reported. They do not count for the run's name or for resuming, so a flag belongs here only if the
    weights cannot depend on it.
    """
    m, lr, adv, training, validation = config.model, config.lr, config.adv, config.training, config.validation
    attack, trained_on = ATTACKS[adv.attack], adv.attack != "none"
    attacked, augmentations = validation.adv_n_ex > 0, config.data.augmentations
    ramp = config.resolution.min_res != config.resolution.max_res
    used_with = [
        *_own_flags("adv.attack", adv.attack, ATTACKS),
        *_own_flags("lr.lr_schedule_type", lr.lr_schedule_type, SCHEDULES),
        ("adv.verbose", attack.reports_steps, f"adv.attack={attacks_that(lambda entry: entry.reports_steps)}"),
        (
            "training.reuse_forward",
            attack.evaluates_last,
            f"adv.attack={attacks_that(lambda entry: entry.evaluates_last)}",
        ),
        ("adv.eps_warmup_epochs", trained_on, "an attack (adv.attack)"),
        ("adv.norm adv.eps", trained_on or attacked, "adv.attack or validation.adv_n_ex"),
        ("validation.adv_n_iter", attacked, "validation.adv_n_ex above 0"),
        ("validation.stop_on_overfitting", attacked and trained_on, "an attack and validation.adv_n_ex above 0"),
        ("training.momentum", training.optimizer == "sgd", "training.optimizer=sgd"),
        ("training.label_smoothing", augmentations == 1, "mixup (data.augmentations=1)"),
        ("model.ema_decay model.ema_warmup", m.model_ema, "model.model_ema=1"),
        ("model.early", m.freeze_some, "model.freeze_some=1"),
        (
            "model.drop_path",
            lr.body_factor > 0 and not (m.freeze_some and m.early),
            "a trained body (lr.body_factor above 0, without model.freeze_some=1 or with model.early=0)",
        ),
        ("data.min_scale data.flip", augmentations != 2, "data.augmentations=0 or 1"),
        ("resolution.start_ramp resolution.end_ramp", ramp, "resolution.min_res below resolution.max_res"),
    ]
    return {name: needed for names, used, needed in used_with if not used for name in names.split()}


def attacks_that(fit: Callable[[AttackEntry], bool]) -> str:
    """Return the values of `adv.attack` that fit, for a message."""
    return " or ".join(name for name, entry in ATTACKS.items() if name != "none" and fit(entry))


def _own_flags(flag: str, value: str, table: Mapping[str, Any]) -> list[tuple[str, bool, str]]:
    """Return (name, whether `value` reads it, values that do) of flags that only some values of `flag` (keys of `table`) read."""
    rows = []
    for own in sorted({name for entry in table.values() for name in entry.flags}):
        readers = [name for name, entry in table.items() if own in entry.flags]
        rows.append((f"{flag.split('.')[0]}.{own}", value in readers, f"{flag}={' or '.join(readers)}"))
    return rows
