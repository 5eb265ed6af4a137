"""Pictures of adversarial images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor


def draw_examples(
    path: Path, x: Tensor, attacked: Mapping[str, tuple[Tensor, Sequence[str]]], labels: Sequence[str], eps: float
) -> None:
    """A grid: images; then for each model its adversarial images, titled with its prediction, and their difference.

    Args:
        path: the PNG to write.
        x: (N, 3, H, W) images in [0, 1].
        attacked: name of a model → its adversarial images (N, 3, H, W) and its predictions on them as text.
        labels: the true classes as text.
        eps: Linf radius; differences are drawn from −eps (black) to +eps (white).
    """
    rows: list[tuple[str, Tensor, Sequence[str]]] = [("image", x, labels)]
    for name, (x_adv, predictions) in attacked.items():
        rows.append((f"{name}:\nadversarial", x_adv, predictions))
        rows.append((f"{name}:\ndifference", ((x_adv - x) / (2 * eps) + 0.5).clamp(0, 1), [""] * len(x)))
    figure = Figure(figsize=(1.15 * len(x) + 1.2, 1.32 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), len(x), squeeze=False)
    for axes_row, (name, images, titles) in zip(grid, rows):
        for axes, image, title, label in zip(axes_row, images, titles, labels):
            axes.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.set_title(title, fontsize=9, color="black" if title == label else "tab:red", pad=2)
        axes_row[0].set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=120)
