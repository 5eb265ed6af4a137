"""AutoAttack (Croce & Hein 2020; L1: 2021) on one chunk of images at a time, verdict by verdict.

The attacks are the standard package's: `pyautoattack`, AutoAttack's name on PyPI, or `autoattack` installed from its
repository. Only the loop around them is ours, so that the verdict of every attack on every image is known; a chunk's verdicts
equal those of `AutoAttack(version="standard").run_standard_evaluation` on that chunk alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError

ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
# The targeted loss compares the four largest logits.
FEWEST_CLASSES = 4


@dataclass(frozen=True)
class Verdicts:
    """What AutoAttack found for B images.

    Attributes:
        clean_pred: (B,) int64 prediction without attack.
        broken_by: per image the attack that broke it, "clean" where misclassified without attack, "" where it withstood all.
        x_adv: (B, C, H, W) float32 on the CPU: the adversarial image, the image itself where none was found.
    """

    clean_pred: Tensor
    broken_by: list[str]
    x_adv: Tensor


def attack_chunk(
    model: nn.Module, x: Tensor, y: Tensor, *, norm: str, eps: float, seed: int, full: bool, device: torch.device
) -> Verdicts:
    """Run AutoAttack on one chunk; each attack sees the images that withstood those before it.

    Args:
        model: in eval mode on `device`; (B, C, H, W) in [0, 1] → logits (B, K).
        x: (B, C, H, W) float32 in [0, 1].
        y: (B,) int64.
        norm: "Linf", "L2" or "L1".
        eps: radius in units of pixels in [0, 1].
        seed: of every attack.
        full: all four attacks, or APGD-CE and APGD-T alone.
        device: where the attacks run.

    Raises:
        UserError: neither package is installed, logits that are not finite, or too few classes for the targeted attacks.
    """
    x, y = x.to(device), y.to(device)
    with torch.no_grad():
        logits = model(x)
    if not torch.isfinite(logits).all():
        raise UserError(
            "eval.model_in: the network's logits are not finite on clean images; its accuracy means nothing."
        )
    if logits.shape[1] < FEWEST_CLASSES:
        raise UserError(
            f"eval.model_in: AutoAttack needs at least {FEWEST_CLASSES} classes, the network has {logits.shape[1]}."
        )
    clean_pred = logits.argmax(dim=1)
    broken_by = ["" if right else "clean" for right in (clean_pred == y).tolist()]
    x_adv = x.clone()
    engine = standard_autoattack(model, norm=norm, eps=eps, seed=seed, device=device, num_classes=logits.shape[1])
    for name in ATTACKS if full else ATTACKS[:2]:
        standing = torch.tensor(
            [i for i, broken in enumerate(broken_by) if not broken], dtype=torch.int64, device=device
        )
        if len(standing) == 0:
            break
        found = perturb(engine, name, x[standing], y[standing], seed=seed)
        with torch.no_grad():
            wrong = model(found).argmax(dim=1) != y[standing]
        x_adv[standing[wrong]] = found[wrong]
        for i in standing[wrong].tolist():
            broken_by[i] = name
    return Verdicts(clean_pred=clean_pred.cpu(), broken_by=broken_by, x_adv=x_adv.cpu())


def standard_autoattack(
    model: nn.Module, *, norm: str, eps: float, seed: int, device: torch.device, num_classes: int
) -> Any:
    """The package's AutoAttack object, version "standard"; with fewer than 10 classes, one target for each other class."""
    autoattack = importlib.import_module(package_name()).AutoAttack
    # The repository's package prints unless told not to; the one on PyPI has no such argument.
    quiet = {"verbose": False} if "verbose" in inspect.signature(autoattack).parameters else {}
    engine = autoattack(model, norm=norm, eps=eps, seed=seed, device=device, version="standard", **quiet)
    for attack in (engine.apgd_targeted, engine.fab):
        attack.n_target_classes = min(attack.n_target_classes, num_classes - 1)
    return engine


def perturb(engine: Any, name: str, x: Tensor, y: Tensor, *, seed: int) -> Tensor:
    """Adversarial candidates (B, …) of one attack, called as `run_standard_evaluation` calls it."""
    if name == "fab-t":
        engine.fab.targeted, engine.fab.n_restarts = True, 1
    engine.apgd.loss = "ce"
    attack = {"apgd-ce": engine.apgd, "apgd-t": engine.apgd_targeted, "fab-t": engine.fab, "square": engine.square}[
        name
    ]
    attack.seed = seed
    with torch.no_grad():
        return attack.perturb(x, y).detach()


def package_name() -> str:
    """The installed AutoAttack package."""
    for name in ("pyautoattack", "autoattack"):
        if importlib.util.find_spec(name) is not None:
            return name
    raise UserError(
        "AutoAttack is not installed: expected the package pyautoattack (pip install pyautoattack) or autoattack."
    )
