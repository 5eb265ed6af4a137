"""Bar charts with error bars."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ablation.statistics import Mean
from common.files import write_atomically

PANEL_WIDTH = 2.8  # inches
COLUMNS = 3


def draw_bars(path: Path, bars: Mapping[str, Mapping[str, Mean | None]], metrics: Sequence[str]) -> None:
    """Draw one panel per metric with one bar per run: the mean over seeds in %; error bars show the standard deviation.

    Args:
        path: PNG file to write.
        bars: run → metric → mean; None if there is no value.
        metrics: names, in the order of the panels.
    """
    names = [name for name, of_run in bars.items() if any(of_run.values())]
    rows, columns = max(1, math.ceil(len(metrics) / COLUMNS)), max(1, min(len(metrics), COLUMNS))
    height = 0.9 + 0.3 * max(len(names), 1)
    figure = Figure(figsize=(1.8 + PANEL_WIDTH * columns, rows * height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes in panels.flatten()[len(metrics) :]:
        axes.set_axis_off()
    for axes, metric in zip(panels.flatten(), metrics):
        for place, name in enumerate(names):
            if (mean := bars[name].get(metric)) is None:
                continue
            error = 100 * mean.sd if mean.sd is not None else None
            axes.barh(place, 100 * mean.mean, xerr=error, capsize=3, color="tab:blue", alpha=0.75)
            end = (100 * mean.mean + (error or 0), place)
            axes.annotate(f"{100 * mean.mean:.1f}", end, (3, 0), textcoords="offset points", va="center", fontsize=7)
        axes.set_title(metric, fontsize=9, parse_math=False)
        axes.set_xlabel("accuracy [%]", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.margins(x=0.15)
        axes.grid(axis="x", alpha=0.3)
    panels[0, 0].set_yticks(range(len(names)), names, parse_math=False)
    panels[0, 0].invert_yaxis()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    write_atomically(path, lambda file: file.write(buffer.getvalue()))
