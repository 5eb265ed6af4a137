"""Pictures of evaluations: accuracy after each attack, and adversarial images next to the clean ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from common.files import write_atomically

MOST_SHOWN = 8


# A decorator: draws names literally; matplotlib would otherwise parse `$` as mathematics.
_plain_text = matplotlib.rc_context({"text.parse_math": False})


@_plain_text
def draw_accuracy(path: Path, curves: Mapping[str, Mapping[str, float]]) -> None:
    """Draw one line per evaluation: accuracy without attack, then after each attack.

    Args:
        path: PNG file to write.
        curves: evaluation → attack → share of the images.
    """
    figure = Figure(figsize=(7, 3.4 + 0.22 * len(curves)), layout="constrained")
    axes = figure.subplots()
    for number, curve in enumerate(curves.values()):
        axes.plot(list(curve), [100 * share for share in curve.values()], marker="os^Dv*P"[number % 7])
    if len(curves) == 1:
        for place, share in enumerate(curve.values()):
            axes.annotate(f"{100 * share:.1f}", (place, 100 * share), (0, 6), textcoords="offset points", ha="center")
    axes.set(ylabel="accuracy [%]", ylim=(0, 105), xlabel="after each attack")
    axes.grid(axis="y", alpha=0.3)
    figure.legend(axes.lines, list(curves), loc="outside lower center", fontsize=8)
    _save(figure, path)


@_plain_text
def draw_examples(
    path: Path,
    x: np.ndarray,
    attacked: Mapping[str, tuple[np.ndarray, Sequence[str]]],
    *,
    labels: Sequence[str],
    title: str = "",
) -> None:
    """Draw a grid: images, then per entry of `attacked` the adversarial images and the difference, scaled from black to white.

    Args:
        path: PNG file to write.
        x: (N, 3, H, W) float in [0, 1]; the first `MOST_SHOWN` are drawn.
        attacked: name → adversarial images (N, 3, H, W) and `broken_by` of each image: an attack, "clean", or "" for none.
        labels: true classes.
        title: title of the picture.
    """
    count = min(len(x), MOST_SHOWN)
    rows: list[tuple[str, np.ndarray, list[str], bool]] = [("image", x[:count], list(labels), False)]
    for name, (x_adv, broken_by) in attacked.items():
        delta = x_adv[:count] - x[:count]
        largest = np.abs(delta).max(axis=(1, 2, 3), keepdims=True)
        magnified = delta / (2 * np.where(largest > 0, largest, 1)) + 0.5
        rows.append((name, x_adv[:count], [broken or "withstood" for broken in broken_by], True))
        rows.append(("difference", magnified, [f"±{d:.3g}" if d > 0 else "" for d in largest.flatten()], False))
    figure = Figure(figsize=(1.3 * count + 1.2, 1.55 * len(rows) + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=9)
    grid = figure.subplots(len(rows), count, squeeze=False)
    for axes_row, (name, images, texts, are_verdicts) in zip(grid, rows):
        axes_row[0].set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
        for axes, image, text in zip(axes_row, images, texts):
            axes.imshow(np.clip(image.transpose(1, 2, 0), 0, 1), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_title(
                text, fontsize=8, pad=2, color="tab:red" if are_verdicts and text != "withstood" else "black"
            )
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, dpi=120, format="png"))
