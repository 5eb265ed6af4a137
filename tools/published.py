"""The tables of published models in README.md and docs/models.md, and their pictures, made from zoo/published.yaml.

python -m tools.published      regenerates them
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from common.errors import UserError
from common.files import write_atomically
from common.provenance import PROJECT
from zoo.published import KNOWN, PUBLISHED, Published

BEGIN, END = "<!-- published: begin -->", "<!-- published: end -->"
DRAWN_PX = 224
HEAD = ("convnext_tiny_cvst", "vit_s_cvst", "convnext_base_cvst", "convnext_large_cvst")  # in README.md
# Key of the PNG's text entry with the drawn values, which reveals a picture that is older than the table.
DRAWN_KEY = "Points"


# -------------------------------------------------------------------------------------------------- tables
def full_table(root: str) -> str:
    """Return the Markdown table of docs/models.md with its footnotes; `root` leads from the page to the project's root."""
    notes = [row.note for row in PUBLISHED.values() if row.note]
    lines = []
    for row in PUBLISHED.values():
        results = row.results.values()
        cells = {
            "model": row.title,
            "epochs": str(row.epochs),
            "px": " / ".join(map(str, row.results)),
            "clean": " / ".join("–" if r is None else f"{r.clean:.1f}" for r in results),
            "AutoAttack": " / ".join("–" if r is None else f"{r.autoattack:.1f}" for r in results),
            "config": f"[`{Path(row.config).stem}`]({root}{row.config})",
            "weights": f"[share]({row.links[0]})",
            "RobustBench": f"`{row.robustbench_id}`" if row.robustbench_id else "–",
        }
        if row.note:
            cells[row.note_on] += _mark(notes.index(row.note))
        if not lines:
            lines = [_line(cells), "|" + "---|" * len(cells)]
        lines.append(_line(cells.values()))
    footnotes = " ".join(f"{_mark(i)} {note}" for i, note in enumerate(notes))
    return "\n".join([*lines, "", footnotes])


def short_table() -> str:
    """Return the Markdown table of README.md: the networks of `HEAD`, at 224 px."""
    lines = ["| published model | clean | AutoAttack, Linf 4/255 | config |", "|---|---|---|---|"]
    for row in map(PUBLISHED.get, HEAD):
        result = row.results[DRAWN_PX]
        numbers = (f"{result.clean:.1f} %", f"{result.autoattack:.1f} %")
        lines.append(_line((row.title, *numbers, f"[`{Path(row.config).stem}`]({row.config})")))
    return "\n".join(lines)


def section(picture: str, table: str) -> str:
    """Return the text between the markers of a page: the picture, at the relative path `picture`, and the table."""
    alternative = f"AutoAttack accuracy at {DRAWN_PX} px of the published models against parameters and multiply-adds"
    return f"{BEGIN}\n![{alternative}]({picture})\n\n{table}\n{END}"


def update_page(page: Path, picture: Path, table: str) -> None:
    """Draw the picture and replace the text between the markers of `page`.

    Raises:
        UserError: `page` cannot be read or lacks the markers; then nothing is written.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{page}: expected a page with the table of published models; {error}.") from error
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise UserError(
            f"{page}: expected {BEGIN} and then {END}, each once, around the table of published models; "
            f"got {text.count(BEGIN)} and {text.count(END)} of them, or the wrong order."
        )
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_published(picture)
    link = Path(os.path.relpath(picture, page.parent)).as_posix()
    new = before + section(link, table) + after
    write_atomically(page, lambda file: file.write(new.encode()))


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _mark(number: int) -> str:
    return "¹²³⁴⁵⁶⁷⁸⁹"[number]


# ------------------------------------------------------------------------------------------------ picture
_MARKERS = {"ConvNeXt": ("o", "#0072b2"), "ViT": ("s", "#d55e00"), "ConvNeXt-iso": ("D", "#009e73")}
# Position of a label beside its marker in a panel: to the right unless that would cover another label.
_LABEL_PLACES = {
    "params": {
        "vit_s": "below",
        "vit_s_cvst": "left",
        "convnext_tiny": "below right",
        "convnext_tiny_cvst": "above",
        "convnext_small_cvst": "left",
        "vit_b": "below",
        "vit_b_cvst": "left",
        "convnext_base_cvst": "left",
        "convnext_large_cvst": "left",
    },
    "gflops": {
        "vit_s": "below",
        "convnext_tiny": "left",
        "convnext_tiny_cvst": "above",
        "vit_b": "below",
        "convnext_base": "left",
        "convnext_base_cvst": "left",
        "convnext_large_cvst": "left",
    },
}
_PLACES = {  # offset in points, horizontal and vertical alignment
    "right": ((7, 0), "left", "center"),
    "left": ((-7, 0), "right", "center"),
    "above": ((0, 7), "center", "bottom"),
    "below": ((0, -7), "center", "top"),
    "below right": ((2, -7), "left", "top"),
}


class Point(NamedTuple):
    """Drawn values of an entry: parameters in millions, multiply-adds in billions, AutoAttack accuracy in %."""

    name: str
    params: float
    gflops: float
    autoattack: float


def drawn_points() -> list[Point]:
    """Return all entries with a published AutoAttack accuracy at 224 px."""
    return [
        Point(row.name, row.params, row.gflops, row.results[DRAWN_PX].autoattack)
        for row in PUBLISHED.values()
        if row.results[DRAWN_PX] is not None
    ]


def stem_pairs() -> list[tuple[Published, Published]]:
    """Return pairs of drawn entries of one architecture, with PatchStem and with ConvStem."""
    rows = [PUBLISHED[point.name] for point in drawn_points()]
    return [
        (patch, conv)
        for patch in rows
        for conv in rows
        if (patch.arch, patch.updated) == (conv.arch, conv.updated) and not patch.not_original and conv.not_original
    ]


def draw_published(path: Path) -> None:
    """Write a PNG: AutoAttack accuracy at 224 px against parameters, and against multiply-adds.

    The PNG's text entry `DRAWN_KEY` contains the points as JSON.
    """
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    left.set(xlabel="parameters [millions]", ylabel=f"AutoAttack accuracy at {DRAWN_PX} px, Linf 4/255 [%]")
    right.set(xlabel=f"multiply-adds at {DRAWN_PX} px [billions]")
    _draw_panel(left, "params", ticks=(20, 30, 50, 100, 200), limits=(14, 260))
    _draw_panel(right, "gflops", ticks=(4, 5, 10, 20, 40), limits=(2.5, 47))
    figure.legend(handles=_legend(), loc="outside lower center", ncols=7, fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png", metadata={DRAWN_KEY: json.dumps(drawn_points())})
    write_atomically(path, lambda file: file.write(buffer.getvalue()))


class Bar(NamedTuple):
    """Drawn values of a robust model, in %."""

    name: str
    clean: float
    autoattack: float
    external: float | None
    in_readme: bool


def drawn_bars() -> list[Bar]:
    """Return all models with an AutoAttack accuracy, the least robust one first."""
    bars = [
        Bar(model.title if model.by == "paper" else model.name, *numbers, model.external, model.by == "paper")
        for model in KNOWN.values()
        if (numbers := next(iter(model.results.values()))) is not None and numbers.autoattack is not None
    ]
    return sorted(bars, key=lambda bar: bar.external or bar.autoattack)


def draw_all(path: Path) -> None:
    """Write a PNG of `drawn_bars`: clean accuracy, and accuracy under AutoAttack or under a stronger attack if one is known.

    The PNG's text entry `DRAWN_KEY` contains the bars as JSON.
    """
    bars = drawn_bars()
    figure = Figure(figsize=(9, 0.24 * len(bars) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, bar in enumerate(bars):
        axes.barh(
            place,
            bar.autoattack,
            color="0.85" if bar.external else "#0072b2" if bar.in_readme else "#999999",
            height=0.7,
        )
        if bar.external:
            axes.barh(place, bar.external, color="#999999", height=0.7)
        axes.plot(bar.clean, place, "o", color="#d55e00", markersize=4)
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars], fontsize=7)
    axes.set(xlim=(0, 85), ylim=(-0.7, len(bars) - 0.3), xlabel="accuracy at Linf 4/255 [%]")
    axes.grid(axis="x", alpha=0.25)
    figure.legend(handles=_legend_of_all(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    metadata = {DRAWN_KEY: json.dumps(bars)}
    write_atomically(path, lambda file: figure.savefig(file, dpi=110, format="png", metadata=metadata))


def _legend_of_all() -> list:
    return [
        Patch(color="#0072b2", label="AutoAttack, models of README's table"),
        Patch(color="#999999", label="AutoAttack (or a stronger attack), other models"),
        Patch(color="0.85", label="AutoAttack, where a stronger attack is known"),
        Line2D([], [], linestyle="", marker="o", color="#d55e00", label="clean"),
    ]


def _draw_panel(axes, attribute: str, *, ticks: tuple[int, ...], limits: tuple[float, float]) -> None:
    points = {point.name: (getattr(point, attribute), point.autoattack) for point in drawn_points()}
    places = _LABEL_PLACES[attribute]
    axes.set_xscale("log")
    axes.set_xticks(ticks, map(str, ticks))
    axes.set_xticks([], minor=True)
    axes.set(xlim=limits, ylim=(42.5, 59.5))
    axes.grid(alpha=0.25)
    for patch, conv in stem_pairs():
        # Dotted if the two entries differ in epochs, not only in their stems.
        style = "-" if patch.epochs == conv.epochs else ":"
        axes.plot(*zip(points[patch.name], points[conv.name]), style, color="0.5", zorder=1)
    for name, place in points.items():
        row = PUBLISHED[name]
        marker, colour = _MARKERS[row.family]
        axes.scatter(*place, s=48, marker=marker, edgecolors=colour, facecolors=colour if row.not_original else "white")
        offset, across, upright = _PLACES[places.get(name, "right")]
        axes.annotate(
            row.title, place, offset, textcoords="offset points", ha=across, va=upright, fontsize=8, color="0.2"
        )


def _legend() -> list:
    families = [
        Line2D([], [], linestyle="", marker=marker, color=colour, label=family)
        for family, (marker, colour) in _MARKERS.items()
    ]
    stems = [
        Line2D([], [], linestyle="", marker="o", color="0.3", markerfacecolor=filling, label=stem)
        for stem, filling in (("ConvStem", "0.3"), ("PatchStem", "white"))
    ]
    pairs = [
        Line2D([], [], linestyle=style, color="0.5", label=label)
        for style, label in (("-", "same epochs"), (":", "different epochs"))
    ]
    return families + stems + pairs


if __name__ == "__main__":
    for page, table in (("README.md", short_table()), ("docs/models.md", full_table("../"))):
        update_page(PROJECT / page, PROJECT / "docs" / "published.png", table)
    draw_all(PROJECT / "docs" / "robust_models.png")
