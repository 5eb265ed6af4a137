"""From verdicts to numbers, and from numbers to files and tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attacks.threat_models import get_threat_model
from common.files import write_atomically
from evaluation.autoattack import Verdicts


def summarise(
    verdicts: Sequence[Verdicts], x: Tensor, *, norm: str, eps: float, attacks: Sequence[str]
) -> dict[str, Any]:
    """Accuracies of one evaluation, and what the adversarial images really are.

    Args:
        verdicts: of successive chunks.
        x: (N, C, H, W) all clean images, in the order of the chunks.
        norm, eps: the threat model.
        attacks: the attacks that ran, in order.

    Returns:
        `clean_acc`, `robust_acc` and `acc_after` each attack as shares of N, `max_perturbation` in the norm, `pixel_range`.
    """
    broken_by = [broken for chunk in verdicts for broken in chunk.broken_by]
    n, standing = len(broken_by), sum(broken != "clean" for broken in broken_by)
    clean, acc_after = standing / n, {}
    for attack in attacks:
        standing -= broken_by.count(attack)
        acc_after[attack] = standing / n
    x_adv = torch.cat([chunk.x_adv for chunk in verdicts])
    return {
        "norm": norm,
        "eps": eps,
        "n": n,
        "clean_acc": clean,
        "acc_after": acc_after,
        "robust_acc": standing / n,
        "max_perturbation": get_threat_model(norm).norm((x_adv - x).double()).max().item(),
        "pixel_range": [x_adv.min().item(), x_adv.max().item()],
    }


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write `report` as JSON, whole or not at all."""
    write_atomically(path, lambda file: file.write(json.dumps(report, indent=2).encode()))


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table with the keys of the first row as its head; shares (floats up to 1) as percentages stay the caller's."""
    head = list(rows[0])
    cells = [head] + [[str(row[key]) for key in head] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def percent(share: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * share:.1f} %"


def show_eps(eps: float) -> str:
    """eps as a multiple of 1/255 where it is one, else as a number."""
    return f"{eps * 255:.0f}/255" if eps < 1 and abs(eps * 255 - round(eps * 255)) < 1e-6 else f"{eps:g}"
