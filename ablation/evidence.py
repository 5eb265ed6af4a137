"""Comparison of a grid's results with a paper's claims: evidence.md and evidence.json.

A claims file is YAML:

    title: …                       # heading of the page
    text: …                        # text above the table
    commands: [bash …]             # commands that reproduce the results
    claims:
      - claim: ConvStem beats PatchStem under adversarial training
        paper: "48.6 → 49.5 %"     # the paper's number, or why there is none
        compare: [patch, base]     # two runs of the grid; the claim is that the second is better
        metric: Linf 8/255         # metric of the comparison
        minus: clean               # optional: the gain must exceed that under this metric
    notes: …                       # text below the table
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablation.grid import Grid, is_one_of
from ablation.results import metric_names
from ablation.statistics import Difference
from ablation.summary import NOTHING, Summary, describe_setting, show_interval
from common.errors import UserError, blame
from common.files import writable
from common.flags import read_yaml
from common.tables import markdown_table
from evaluation.report import write_text

AGREES, DOES_NOT, CANNOT_TELL, NOT_RUN = "agrees", "does not agree", "cannot tell", "not run"
CLAIM_KEYS = {"claim", "paper", "compare", "metric", "minus"}


@dataclass(frozen=True)
class Claim:
    """One claim: the second of `compare` is better than the first, under `metric` (by more than under `minus`)."""

    claim: str
    paper: str
    compare: tuple[str, str]
    metric: str
    minus: str = ""


def verdict(difference: Difference | None) -> str:
    """Return the verdict on a claim: the difference is above zero, below zero, undecided or missing.

    The sign counts as decided if both intervals lie on one side of zero: other seeds and other test images would show the same
    sign. With one seed only the interval over images counts.
    """
    if difference is None:
        return NOT_RUN
    intervals = [interval for interval in (difference.ci95, difference.ci95_images) if interval]
    if intervals and all(low > 0 for low, _ in intervals):
        return AGREES
    if intervals and all(high < 0 for _, high in intervals):
        return DOES_NOT
    return CANNOT_TELL


def write_evidence(summary: Summary, path: Path, folder: Path) -> None:
    """Write evidence.md, evidence.json and evidence.png of a claims file.

    Raises:
        UserError: as `read_claims`, or the folder is not writable.
    """
    content, claims = read_claims(path, summary.grid)
    found = [(claim, summary.difference(*claim.compare, claim.metric, minus=claim.minus)) for claim in claims]
    with writable("--evidence", folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "evidence.json", json.dumps(_json(summary, found), indent=2, ensure_ascii=False) + "\n")
        summary.draw(folder / "evidence.png")
        write_text(folder / "evidence.md", _markdown(content, summary, found))


def read_claims(path: Path, grid: Grid) -> tuple[Mapping[str, Any], list[Claim]]:
    """Read the texts and the claims of a file.

    Raises:
        UserError: the file is unreadable, has no claim, or uses unknown runs, metrics or keys.
    """
    with blame("claims"):
        content = read_yaml(path)
    if not isinstance(content, dict) or not isinstance(content.get("claims"), list) or not content["claims"]:
        raise UserError(f"claims: {path}: expected a mapping with a list `claims` of at least one claim.")
    for key in ("title", "text", "notes"):
        if not isinstance(content.setdefault(key, ""), str):
            raise UserError(f"claims: {path}: {key}: expected text, got {content[key]!r}.")
    commands = content.setdefault("commands", [])
    if not isinstance(commands, list) or not all(isinstance(command, str) for command in commands):
        raise UserError(f"claims: {path}: commands: expected a list of strings, got {commands!r}.")
    claims = content["claims"]
    return content, [_claim(item, f"claims: {path}, claim {number}", grid) for number, item in enumerate(claims, 1)]


def _claim(item: Any, where: str, grid: Grid) -> Claim:
    if not isinstance(item, dict) or not {"claim", "compare", "metric"} <= item.keys() <= CLAIM_KEYS:
        raise UserError(f"{where}: expected the keys {', '.join(sorted(CLAIM_KEYS))}; got {item!r}.")
    claim, paper, pair = item["claim"], item.get("paper", NOTHING), item["compare"]
    if not isinstance(claim, str):
        raise UserError(f"{where}: claim: expected text, got {claim!r}.")
    if not isinstance(paper, (str, int, float)):
        raise UserError(f"{where}: paper: expected text or a number, got {paper!r}.")
    if not isinstance(pair, list) or len(pair) != 2 or not all(is_one_of(name, grid.entries) for name in pair):
        raise UserError(f"{where}: compare: expected two of {', '.join(grid.entries)}; got {pair!r}.")
    entries = [grid.entries[name] for name in pair]
    first, second = (metric_names(grid.cell(entry.arm, grid.seeds[0]), entry) for entry in entries)
    metrics = [name for name in first if name in second]
    metric, minus = item["metric"], item.get("minus") or ""
    for key, value, known in (("metric", metric, metrics), ("minus", minus, ["", *metrics])):
        if not is_one_of(value, known):
            raise UserError(
                f"{where}: {key}: expected a metric that both {' and '.join(pair)} have ({'; '.join(metrics)}); "
                f"got {value!r}."
            )
    return Claim(claim, str(paper), (pair[0], pair[1]), metric, minus)


def _markdown(content: Mapping[str, Any], summary: Summary, found: list[tuple[Claim, Difference | None]]) -> str:
    rows = []
    for claim, difference in found:
        first, second = claim.compare
        how = f"{second} − {first}, {claim.metric}" + (f", minus that for {claim.minus}" if claim.minus else "")
        rows.append(
            {
                "claim": claim.claim,
                "paper": claim.paper,
                "this implementation": f"{100 * difference.mean:+.1f}" if difference else NOTHING,
                "95 %, seeds": show_interval(difference.ci95) if difference and difference.ci95 else NOTHING,
                "95 %, images": show_interval(difference.ci95_images)
                if difference and difference.ci95_images
                else NOTHING,
                "seeds": _seeds(difference),
                "verdict": verdict(difference),
                "measured as": how,
            }
        )
    parts = [f"# {content['title'] or 'Evidence'}", content["text"].strip()]
    parts.append(markdown_table(rows))
    parts.append(
        "This implementation: mean over seeds of the paired difference, in percentage points of accuracy. 95 %, seeds: Student's t "
        "interval over seeds, for the same test images. 95 %, images: interval over test images, for the same networks. The "
        "verdict is 'agrees' or 'does not agree' if both intervals lie on one side of zero."
    )
    parts.append(f"## Results\n\nAccuracy in %, mean ± standard deviation over seeds.\n\n{summary.results_table()}")
    parts.append("![accuracy of all runs](evidence.png)")
    if summary.grid.compare:
        parts.append(f"Paired differences [95 % interval over seeds]:\n\n{summary.comparisons_table()}")
    if problems := summary.problems():
        parts.append("Failed, unusual and missing runs:\n\n" + "\n".join(f"- {line}" for line in problems))
    parts.append(f"## Setting\n\n{describe_setting(summary.setting())}")
    if commands := content["commands"]:
        parts.append("## Reproduction\n\n```bash\n" + "\n".join(commands) + "\n```")
    parts.append(content["notes"].strip())
    return "\n\n".join(part for part in parts if part) + "\n"


def _seeds(difference: Difference | None) -> str:
    if difference is None:
        return "0"
    return "one seed" if difference.seeds == 1 else str(difference.seeds)


def _points(interval: tuple[float, float] | None) -> list[float] | None:
    return [round(100 * bound, 2) for bound in interval] if interval else None


def _json(summary: Summary, found: list[tuple[Claim, Difference | None]]) -> dict[str, Any]:
    return {
        "grid": summary.grid.name,
        "unit": "percentage points of accuracy",
        "setting": summary.setting(),
        "claims": [
            {
                "claim": claim.claim,
                "paper": claim.paper,
                "ours": round(100 * difference.mean, 2) if difference else None,
                "ci95": _points(difference.ci95) if difference else None,
                "ci95_images": _points(difference.ci95_images) if difference else None,
                "seeds": difference.seeds if difference else 0,
                "verdict": verdict(difference),
                "compare": claim.compare,
                "metric": claim.metric,
                "minus": claim.minus,
            }
            for claim, difference in found
        ],
        "problems": summary.problems(),
    }
