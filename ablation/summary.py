"""Summary of a grid: Markdown, CSV, JSON and a bar chart."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ablation.grid import Grid
from ablation.pictures import draw_bars
from ablation.results import Result, Training, read_results, read_trainings
from ablation.statistics import Difference, Mean, Value, mean_of, paired
from common.files import writable
from common.tables import markdown_table
from evaluation.report import write_text

NOTHING = "–"


class Summary:
    """Results of a grid with the statistics and tables made from them."""

    def __init__(self, grid: Grid, results: Sequence[Result], trainings: Sequence[Training]) -> None:
        self.grid, self.results, self.trainings = grid, list(results), list(trainings)
        self.metrics = list(dict.fromkeys(name for result in results for name in result.metrics))

    def values(self, entry: str, metric: str) -> dict[int, Value]:
        """Return seed → value for the runs that have the metric."""
        return {r.seed: r.metrics[metric] for r in self.results if r.entry.name == entry and metric in r.metrics}

    def mean(self, entry: str, metric: str) -> Mean | None:
        values = self.values(entry, metric)
        return mean_of([value.share for value in values.values()]) if values else None

    def difference(self, first: str, second: str, metric: str, *, minus: str = "") -> Difference | None:
        """Return second minus first for a metric, paired by seed; with `minus`, less the same difference for that metric."""
        terms = [(-1, self.values(first, metric)), (1, self.values(second, metric))]
        if minus:
            terms += [(1, self.values(first, minus)), (-1, self.values(second, minus))]
        return paired(terms)

    # ---------------------------------------------------------------------------------------------- tables
    def results_table(self) -> str:
        """Return a table with a row per entry: mean ± standard deviation over seeds, in %."""
        rows = []
        for name in self.grid.entries:
            of_entry = [r for r in self.results if r.entry.name == name]
            finished = [r for r in of_entry if r.status == "finished"]
            row = {"run": name, "seeds": f"{len(finished)}/{len(of_entry)}"}
            row |= {metric: show_mean(self.mean(name, metric)) for metric in self.metrics}
            for part in ("training", "evaluation"):
                seconds = [r.seconds.get(part, 0.0) for r in finished]
                row[f"{part} [s]"] = f"{sum(seconds) / len(seconds):.0f}" if seconds else NOTHING
            rows.append(row)
        return markdown_table(rows) if rows else "No run is evaluated."

    def comparisons_table(self) -> str:
        """Return a table with a row per comparison: mean paired difference in points, with its interval over seeds."""
        rows = []
        for first, second in self.grid.compare:
            found = {metric: self.difference(first, second, metric) for metric in self.metrics}
            pairs = max((d.seeds for d in found.values() if d), default=0)
            rows.append(
                {"difference": f"{second} − {first}", "seeds": pairs}
                | {metric: show_difference(difference) for metric, difference in found.items()}
            )
        return markdown_table(rows)

    def problems(self) -> list[str]:
        """Return one line per failed or unusual run, and one line per entry with missing runs."""
        lines = [f"{r.entry.name}, seed {r.seed}: {r.status}; {'; '.join(r.notes)}" for r in self.results if r.notes]
        for name in self.grid.entries:
            missing = [str(r.seed) for r in self.results if r.entry.name == name and r.status == "open" and not r.notes]
            if missing:
                lines.append(f"{name}, seed {', '.join(missing)}: not run")
        return lines

    def setting(self) -> dict[str, Any]:
        """Return commits, versions and hardware of the results, and the time that they took."""
        known = [p for r in self.results for p in r.provenance] + [t.provenance for t in self.trainings if t.provenance]
        versions: dict[str, set[str]] = {}
        for provenance in known:
            for package, version in provenance.get("versions", {}).items():
                versions.setdefault(package, set()).add(version)
        return {
            "commits": sorted({str(p.get("commit")) for p in known}),
            "python": sorted({str(p.get("python")) for p in known}),
            "versions": {name: sorted(found) for name, found in sorted(versions.items())},
            "devices": sorted({device for p in known for device in p.get("devices", [])}),
            "threads": sorted({int(p["threads"]) for p in known if "threads" in p}),
            "trainings": sum(bool(t.provenance) for t in self.trainings),
            "hours": round(
                sum([t.seconds for t in self.trainings] + [self._evaluating(r) for r in self.results]) / 3600, 2
            ),
        }

    @staticmethod
    def _evaluating(result: Result) -> float:
        return result.seconds.get("evaluation", 0.0)

    # ---------------------------------------------------------------------------------------------- files
    def markdown(self) -> str:
        parts = [
            f"# {self.grid.name}",
            f"Accuracy in %, mean ± standard deviation over seeds.\n\n{self.results_table()}",
        ]
        if self.grid.compare:
            parts.append(
                "Paired differences in percentage points: mean over seeds [95 % interval, Student's t over seeds]. With one seed: "
                "{interval over images}.\n\n" + self.comparisons_table()
            )
        if problems := self.problems():
            parts.append("Failed, unusual and missing runs:\n\n" + "\n".join(f"- {line}" for line in problems))
        return "\n\n".join([*parts, describe_setting(self.setting())]) + "\n"

    def csv(self) -> str:
        """Return a table with one line per entry, seed and metric."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["run", "arm", "weights", "seed", "status", "metric", "share", "images", "notes"])
        for r in self.results:
            head = [r.entry.name, r.entry.arm, r.entry.weights, r.seed, r.status]
            for metric, value in r.metrics.items() or [("", None)]:
                share = [metric, value.share, value.n or ""] if value else ["", "", ""]
                writer.writerow([*head, *share, "; ".join(r.notes)])
        return text.getvalue()

    def json(self) -> dict[str, Any]:
        return {
            "grid": self.grid.name,
            "setting": self.setting(),
            "runs": {
                name: {m: asdict(mean) for m in self.metrics if (mean := self.mean(name, m))}
                for name in self.grid.entries
            },
            "differences": [
                {"first": a, "second": b, "metric": m, **asdict(d)}
                for a, b in self.grid.compare
                for m in self.metrics
                if (d := self.difference(a, b, m))
            ],
            "problems": self.problems(),
        }

    def draw(self, path: Path) -> None:
        """Draw a bar chart of all means as a PNG file."""
        bars = {name: {m: self.mean(name, m) for m in self.metrics} for name in self.grid.entries}
        draw_bars(path, bars, self.metrics)

    def write(self) -> None:
        """Write summary.md, summary.csv, summary.json and summary.png into the grid's folder."""
        out = self.grid.out
        with writable("--out", out):
            out.mkdir(parents=True, exist_ok=True)
            write_text(out / "summary.csv", self.csv())
            write_text(out / "summary.json", json.dumps(self.json(), indent=2))
            self.draw(out / "summary.png")
            write_text(out / "summary.md", self.markdown())


def summarise(grid: Grid) -> Summary:
    """Read the existing results, write the summary and return it."""
    summary = Summary(grid, read_results(grid), read_trainings(grid))
    summary.write()
    return summary


def show_mean(mean: Mean | None) -> str:
    if mean is None:
        return NOTHING
    return f"{100 * mean.mean:.1f}" + (f" ± {100 * mean.sd:.1f}" if mean.sd is not None else " (1 seed)")


def show_difference(difference: Difference | None) -> str:
    if difference is None:
        return NOTHING
    text = f"{100 * difference.mean:+.1f}"
    if difference.ci95:
        return f"{text} [{show_interval(difference.ci95)}]"
    return text + (f" {{{show_interval(difference.ci95_images)}}}" if difference.ci95_images else "")


def show_interval(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}"


def describe_setting(setting: Mapping[str, Any]) -> str:
    """Return one paragraph on hardware, time, commits and versions."""
    if not setting["commits"]:
        return "Nothing has run yet."
    versions = ", ".join(f"{name} {'/'.join(found)}" for name, found in setting["versions"].items())
    commits = ", ".join(commit[:10] + commit[40:] for commit in setting["commits"])
    return (
        f"{setting['trainings']} trainings, {setting['hours']:.2f} hours including evaluations, summed over runs, on "
        f"{', '.join(setting['devices'])} ({'/'.join(map(str, setting['threads']))} threads per run); commit {commits}; "
        f"Python {'/'.join(setting['python'])}, {versions}."
    )
