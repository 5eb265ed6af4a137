"""Texts for a submission to RobustBench, from a report: the model_info JSON and the text of the form."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from common.errors import UserError

NEEDED = {"network", "norm", "eps", "seed", "attacks", "engine", "n", "clean_acc", "robust_acc", "check"}
# Text fields on the paper that are not in a report, and their placeholder. Further ones: additional_data (bool), architecture.
FIELDS, PLACEHOLDER = ("title", "link", "authors", "venue", "checkpoint"), "(to be filled in)"


def check_report(report: Mapping[str, Any], source: str) -> None:
    """Check that a report meets the requirements of RobustBench's ImageNet leaderboard.

    Raises:
        UserError: not the full AutoAttack, another threat model, not 5,000 images, or adversarial images that fail the checks.
    """
    if not isinstance(report, Mapping) or not NEEDED <= report.keys():
        raise UserError(f"{source}: expected the report.json of an evaluation.")
    wrong = []
    if list(report["attacks"] or ()) != ["apgd-ce", "apgd-t", "fab-t", "square"]:
        wrong.append("all four attacks of AutoAttack")
    if report["norm"] != "Linf" or abs(report["eps"] - 4 / 255) > 1e-9:
        wrong.append(f"Linf with radius 4/255, not {report['norm']} {report['eps']:g}")
    if report["n"] != 5000:
        wrong.append(f"its 5,000 images, not {report['n']}")
    failed = sorted(name for name, places in report["check"].items() if places and name != "not_misclassified")
    if failed:
        wrong.append(f"adversarial images that pass the final check (failed: {', '.join(failed)})")
    if wrong:
        raise UserError(f"{source}: RobustBench's ImageNet leaderboard expects {'; '.join(wrong)}.")


def model_info(report: Mapping[str, Any], paper: Namespace) -> dict[str, Any]:
    """Return the content of RobustBench's `model_info/imagenet/<norm>/<id>.json`; `paper`: data not in a report, see `FIELDS`."""
    robust = f"{100 * report['robust_acc']:.2f}"
    return {
        "link": paper.link,
        "name": paper.title,
        "authors": paper.authors,
        "additional_data": paper.additional_data,
        "number_forward_passes": 1,
        "dataset": "imagenet",
        "venue": paper.venue,
        "architecture": paper.architecture or report["network"]["arch"],
        "eps": _fraction(report["eps"]),
        "clean_acc": f"{100 * report['clean_acc']:.2f}",
        "reported": robust,
        "autoattack_acc": robust,
        "unreliable": False,
    }


def form_text(report: Mapping[str, Any], paper: Namespace) -> str:
    """Return the text of RobustBench's "New Model(s)" form, filled in; `paper` as in `model_info`."""
    fields = {
        "Paper Information": {"Paper Title": paper.title, "Paper URL": paper.link, "Paper authors": paper.authors},
        "Leaderboard Claim(s)": {
            "Architecture": paper.architecture or report["network"]["arch"],
            "Threat Model": report["norm"],
            "eps": _fraction(report["eps"]),
            "Clean accuracy": f"{100 * report['clean_acc']:.2f}%",
            "Robust accuracy": f"{100 * report['robust_acc']:.2f}%",
            "Additional data": str(paper.additional_data).lower(),
            "Evaluation method": f"AutoAttack (standard, {report['engine']}, seed {report['seed']}), RobustBench's 5,000 images",
            "Checkpoint and code": f"{paper.checkpoint} (SHA-256 {report['network']['sha256']})",
        },
    }
    return "\n".join(
        f"# {head}\n\n" + "".join(f"- **{name}**: {value}\n" for name, value in lines.items())
        for head, lines in fields.items()
    )


def _fraction(eps: float) -> str:
    steps = eps * 255
    return f"{steps:.0f}/255" if eps < 1 and abs(steps - round(steps)) < 1e-6 else f"{eps:g}"
