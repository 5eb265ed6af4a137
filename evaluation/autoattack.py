"""AutoAttack (Croce & Hein 2020; L1: 2021) on one chunk of images at a time, with the verdict of each attack on each image.

The attacks are those of the standard package: `pyautoattack`, AutoAttack's name on PyPI, or `autoattack`, installed from its
repository. Only the loop around them is implemented here, because the package does not return which attack broke which image.
A chunk's verdicts equal those of `AutoAttack(version="standard").run_standard_evaluation` on that chunk alone.
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

# The targeted loss compares the four largest logits; the other attacks need two classes.
FEWEST_CLASSES = {"apgd-t": 4}


class Among(nn.Module):
    """A network restricted to the logits of some of its classes."""

    def __init__(self, network: nn.Module, classes: Sequence[int]) -> None:
        """Wrap `network`; output i is its logit of class `classes[i]`. `classes` is sorted."""
        super().__init__()
        self.network = network
        self.register_buffer("classes", torch.tensor(classes), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.restricted(self.network(x))

    def restricted(self, logits: Tensor) -> Tensor:
        """Select the logits: (B, K) of the network → (B, len(classes))."""
        return logits.index_select(1, self.classes)


@dataclass(frozen=True)
class Verdicts:
    """What AutoAttack found for B images.

    Attributes:
        clean_pred: (B,) int64 prediction without attack.
        broken_by: per image, the attack that broke it; "clean" if it is misclassified without attack; "" if no attack broke it.
        adv_pred: (B,) int64 prediction on the adversarial image; `clean_pred` where none was found.
        x_adv: (B, C, H, W) float32 on the CPU: the adversarial image, or the clean image where none was found.
        attack_seconds: time inside each attack.
        rejoined: number of images that were attacked again because they fooled the fast copy but not the network.
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
    """Run AutoAttack on one chunk; each attack gets the images that the attacks before it did not break.

    With a fast copy, the attacks run on the copy, and the network checks the adversarial images. An image that fools the copy
    but not the network is attacked again on the network itself, by all attacks. So robustness is never overstated.

    Args:
        model: the network, in eval mode on `device`; (B, C, H, W) in [0, 1] → logits (B, K).
        x: (B, C, H, W) float32 in [0, 1], on the CPU; only the images under attack are copied to the device.
        y: (B,) int64.
        norm: "Linf", "L2" or "L1".
        eps: radius in units of pixels in [0, 1].
        seed: seed of every attack.
        attacks: entries of `ATTACKS`, in order.
        device: device of the attacks.
        fast: a faster, less exact copy of the network to attack: compiled, in TensorFloat-32, or both.
        tf32: whether the fast copy computes in TensorFloat-32.
        progress: called with the name of each attack when it begins.

    Raises:
        UserError: neither package is installed, logits are not finite, or there are too few classes for the targeted attacks.
    """
    with float32_matmul(tf32=False):
        logits = _logits(model, x.to(device))
        if not torch.isfinite(logits).all():
            raise UserError(
                "eval.model_in: the network's logits on clean images are not finite, so its accuracy is meaningless."
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
    """Attack the fast copy (without one, the network) and record in `verdicts` the images that the network misclassifies.

    Only the images at the indices `among` are attacked. Returns the indices of images that fooled the copy but not the network.
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
    """Check that the number of classes is sufficient for each attack.

    Raises:
        UserError: it is not; the message lists the attacks that can run.
    """
    able = [name for name in ATTACKS if FEWEST_CLASSES.get(name, 2) <= num_classes]
    for name in attacks:
        if name not in able:
            raise UserError(
                f"eval.attacks: {name} needs at least {FEWEST_CLASSES.get(name, 2)} classes, got {num_classes}"
                + (f"; give --eval.attacks={','.join(able)}." if able else ".")
            )


def check_adversarial(
    model: nn.Module, x: Tensor, verdicts: Verdicts, y: Tensor, *, norm: str, eps: float, device: torch.device
) -> dict[str, Any]:
    """Check the adversarial images independently of the attacks: in float32, in one batch.

    The radius is checked with a tolerance for the rounding of float32 pixels. Attacks that minimise the perturbation end close to
    the decision boundary. There, the rounding of a different batch can make the prediction correct again (`not_misclassified`).

    Args:
        model, x, y, norm, eps, device: as in `attack_chunk`.
        verdicts: result of `attack_chunk`.

    Returns:
        `max_perturbation`: largest distance from the clean image in the norm; `pixel_range`: smallest and largest value;
        `outside_ball`, `outside_box`, `not_misclassified`, `not_finite` (logits): indices in the chunk of images that fail.
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
    """Return how far the norm of a perturbation may exceed `eps` by the rounding of float32 pixels in [0, 1]."""
    half_step = 2.0**-24  # for numbers in [0.5, 1); counted twice: for the sum and for the added perturbation
    return 1e-5 * eps + 2 * half_step * {"Linf": 1.0, "L2": pixels**0.5, "L1": float(pixels)}[norm]


def standard_autoattack(
    model: nn.Module, *, norm: str, eps: float, seed: int, device: torch.device, num_classes: int
) -> Any:
    """Return the package's AutoAttack object, version "standard"; with fewer than 10 classes, one target per other class."""
    autoattack = importlib.import_module(package_name()).AutoAttack
    # The repository's package prints by default; the one on PyPI has no argument `verbose`.
    quiet = {"verbose": False} if "verbose" in inspect.signature(autoattack).parameters else {}
    engine = autoattack(model, norm=norm, eps=eps, seed=seed, device=device, version="standard", **quiet)
    for attack in (engine.apgd_targeted, engine.fab):
        attack.n_target_classes = min(attack.n_target_classes, num_classes - 1)
    return engine


def perturb(engine: Any, name: str, x: Tensor, y: Tensor, *, seed: int) -> Tensor:
    """Return the adversarial candidates (B, …) of one attack, called as in `run_standard_evaluation`."""
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
    """Return the name of the installed AutoAttack package."""
    for name in ("pyautoattack", "autoattack"):
        if importlib.util.find_spec(name) is not None:
            return name
    raise UserError(
        "AutoAttack is not installed: expected the package pyautoattack (pip install pyautoattack) or autoattack."
    )


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)
