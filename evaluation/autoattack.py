"""AutoAttack (Croce & Hein 2020; L1: 2021) on one chunk of images at a time, verdict by verdict.

The attacks are the standard package's: `pyautoattack`, AutoAttack's name on PyPI, or `autoattack` installed from its
repository. Only the loop around them is ours, so that the verdict of every attack on every image is known; a chunk's verdicts
equal those of `AutoAttack(version="standard").run_standard_evaluation` on that chunk alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attacks.threat_models import get_threat_model
from common.errors import UserError
from common.precision import float32_matmul
from evaluation.config import ATTACKS

# The targeted loss compares the four largest logits; the other attacks need a second class.
FEWEST_CLASSES = {"apgd-t": 4}


class Among(nn.Module):
    """A network whose predictions are taken from some of its classes."""

    def __init__(self, network: nn.Module, classes: Sequence[int]) -> None:
        """Logit i is that of the class `classes[i]` of `network`; they are in order."""
        super().__init__()
        self.network = network
        self.register_buffer("classes", torch.tensor(classes), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.restricted(self.network(x))

    def restricted(self, logits: Tensor) -> Tensor:
        """(B, K) of the network → (B, len(classes))."""
        return logits.index_select(1, self.classes)


@dataclass(frozen=True)
class Verdicts:
    """What AutoAttack found for B images.

    Attributes:
        clean_pred: (B,) int64 prediction without attack.
        broken_by: per image the attack that broke it, "clean" where misclassified without attack, "" where it withstood all.
        adv_pred: (B,) int64 prediction on the image that broke it; where none did, `clean_pred`.
        x_adv: (B, C, H, W) float32 on the CPU: the adversarial image, the image itself where none was found.
        attack_seconds: time inside each attack.
        rejoined: number of images that the fast copy took for broken and the network did not: they were attacked again.
    """

    clean_pred: Tensor
    broken_by: list[str]
    adv_pred: Tensor
    x_adv: Tensor
    attack_seconds: dict[str, float] = field(default_factory=dict)
    rejoined: int = 0


def attack_chunk(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: str,
    eps: float,
    seed: int,
    attacks: Sequence[str] = ATTACKS,
    device: torch.device,
    fast: nn.Module | None = None,
    tf32: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Verdicts:
    """Run AutoAttack on one chunk; each attack sees the images that withstood those before it.

    With a fast copy, the attacks run on it and the network judges what they find. An image that the copy takes for broken and
    the network does not is attacked again on the network itself, by all attacks: robustness is never overstated.

    Args:
        model: the network, in eval mode on `device`; (B, C, H, W) in [0, 1] → logits (B, K).
        x: (B, C, H, W) float32 in [0, 1], on the host; only the images under attack are copied to the device.
        y: (B,) int64.
        norm: "Linf", "L2" or "L1".
        eps: radius in units of pixels in [0, 1].
        seed: of every attack.
        attacks: names out of `ATTACKS`, in order.
        device: where the attacks run.
        fast: the network as it is attacked where speed is bought with exactness: compiled, in TensorFloat-32, or both.
        tf32: whether the fast copy computes in TensorFloat-32.
        progress: called with the name of each attack that begins.

    Raises:
        UserError: neither package is installed, logits that are not finite, or too few classes for the targeted attacks.
    """
    with float32_matmul(tf32=False):
        logits = _logits(model, x.to(device))
        if not torch.isfinite(logits).all():
            raise UserError(
                "eval.model_in: the network's logits are not finite on clean images; its accuracy means nothing."
            )
        check_classes(logits.shape[1], attacks)
        clean_pred = logits.argmax(dim=1).cpu()
        broken_by = ["" if right else "clean" for right in (clean_pred == y).tolist()]
        verdicts = Verdicts(clean_pred, broken_by, clean_pred.clone(), x.clone(), dict.fromkeys(attacks, 0.0))
        settings = {"norm": norm, "eps": eps, "seed": seed, "device": device, "num_classes": logits.shape[1]}
        run = partial(_run_attacks, model, x, y, verdicts, attacks=attacks, settings=settings, progress=progress)
        suspects = run(fast, range(len(x)), tf32=tf32)
        rejoined = [i for i in sorted(suspects) if not broken_by[i]]
        if rejoined:
            run(None, rejoined)
    return replace(verdicts, rejoined=len(rejoined))


def _run_attacks(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    verdicts: Verdicts,
    fast: nn.Module | None,
    among: Sequence[int],
    *,
    tf32: bool = False,
    attacks: Sequence[str],
    settings: Mapping[str, Any],
    progress: Callable[[str], None] | None,
) -> set[int]:
    """Attack the fast copy, or the network where there is none, and note in `verdicts` what the network takes for broken.

    Only images whose places are in `among` are attacked. Returns the places of those that fooled the copy and not the network.
    """
    attacked = model if fast is None else fast
    engine, device, suspects = standard_autoattack(attacked, **settings), settings["device"], set()
    for name in attacks:
        places = torch.tensor([i for i in among if not verdicts.broken_by[i]], dtype=torch.int64)
        if len(places) == 0:
            break
        if progress is not None:
            progress(name)
        begin = time.perf_counter()
        with float32_matmul(tf32=tf32):
            found = perturb(engine, name, x[places].to(device), y[places].to(device), seed=settings["seed"])
            fooled = fast is not None and _logits(attacked, found).argmax(dim=1).cpu() != y[places]
        predicted = _logits(model, found).argmax(dim=1).cpu()  # waits for the GPU
        wrong = predicted != y[places]
        verdicts.attack_seconds[name] += time.perf_counter() - begin
        suspects.update(places[fooled & ~wrong].tolist())
        verdicts.x_adv[places[wrong]] = found.cpu()[wrong]
        verdicts.adv_pred[places[wrong]] = predicted[wrong]
        for i in places[wrong].tolist():
            verdicts.broken_by[i] = name
    return suspects


def check_classes(num_classes: int, attacks: Sequence[str]) -> None:
    """Refuse a network with too few classes for one of the attacks.

    Raises:
        UserError: it names the attacks that can run.
    """
    able = [name for name in ATTACKS if FEWEST_CLASSES.get(name, 2) <= num_classes]
    for name in attacks:
        if name not in able:
            raise UserError(
                f"eval.attacks: {name} needs at least {FEWEST_CLASSES.get(name, 2)} classes, there are {num_classes}"
                + (f"; give --eval.attacks={','.join(able)}." if able else ".")
            )


def check_adversarial(
    model: nn.Module, x: Tensor, verdicts: Verdicts, y: Tensor, *, norm: str, eps: float, device: torch.device
) -> dict[str, Any]:
    """Look at the adversarial images again: in float32, all at once, with nothing that the attacks computed.

    The ball is held up to the rounding of float32 pixels. Attacks that look for the smallest perturbation end so close to the
    decision boundary that another batch's rounding can carry an image back over it: `not_misclassified` counts those.

    Args:
        model, x, y, norm, eps, device: as in `attack_chunk`.
        verdicts: its result.

    Returns:
        `max_perturbation`: largest distance from the clean image in the norm; `pixel_range`: smallest and largest value;
        `outside_ball`, `outside_box`, `not_misclassified`, `not_finite` (the logits): places in the chunk of the images that fail.
    """
    x_adv = verdicts.x_adv
    size = get_threat_model(norm).norm((x_adv - x).double()).flatten()
    with float32_matmul(tf32=False):
        logits = _logits(model, x_adv.to(device)).cpu()
    broken = torch.tensor([bool(attack) for attack in verdicts.broken_by])
    pixels = x_adv.flatten(1)
    fails = {
        "outside_ball": ~(size <= eps + rounding(norm, eps, x[0].numel())),
        "outside_box": (pixels.amin(1) < 0) | (pixels.amax(1) > 1) | ~torch.isfinite(pixels).all(1),
        "not_misclassified": broken & (logits.argmax(dim=1) == y),
        "not_finite": ~torch.isfinite(logits).all(1),
    }
    found = {"max_perturbation": size.max().item(), "pixel_range": (pixels.min().item(), pixels.max().item())}
    return found | {name: mask.nonzero().flatten().tolist() for name, mask in fails.items()}


def rounding(norm: str, eps: float, pixels: int) -> float:
    """How far beyond `eps` the norm of a perturbation may be for no other reason than float32 pixels in [0, 1]."""
    half_step = 2.0**-24  # of numbers in [0.5, 1), twice: in the sum, and in what was added
    return 1e-5 * eps + 2 * half_step * {"Linf": 1.0, "L2": pixels**0.5, "L1": float(pixels)}[norm]


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


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)
