"""Plot of a run's log."""

from __future__ import annotations

from pathlib import Path

from common.files import write_atomically
from training.status import read_log

# Panel → (key of an epoch's record, label). The console also prints these numbers.
CURVES = {
    "loss": (("train_loss", "training"), ("loss", "validation"), ("ema_loss", "validation, EMA")),
    "accuracy": (
        ("top1", "clean"),
        ("adv_top1", "quick adversarial"),
        ("train_attack_top1", "training attack"),
        ("ema_top1", "clean, EMA"),
        ("ema_adv_top1", "quick adversarial, EMA"),
    ),
    "learning rate": (("lr", "last step of the epoch"),),
}


def draw_curves(log: Path, picture: Path) -> None:
    """Draw `CURVES` by epoch from the epoch records of `log` into a PNG."""
    # Imported here, because the import takes most of a second at every start.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    records = read_log(log, "epoch")
    figure = Figure(figsize=(12, 3.6))
    # No layout engine: it takes as long as the drawing.
    figure.subplots_adjust(left=0.05, right=0.985, bottom=0.14, top=0.91, wspace=0.3)
    FigureCanvasAgg(figure)
    for axes, (title, curves) in zip(figure.subplots(1, len(CURVES)), CURVES.items()):
        for key, label in curves:
            points = [(r["epoch"], r[key]) for r in records if isinstance(r.get(key), (int, float))]
            if points:
                axes.plot(*zip(*points), marker="o", markersize=3, label=label)
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
        if title == "accuracy":
            axes.set_ylim(0, 1)
    write_atomically(picture, lambda file: figure.savefig(file, dpi=110, format="png"))
