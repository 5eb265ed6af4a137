"""Evaluation with plain pyautoattack, chunk by chunk: the baseline for runner_aa_eval.py.

    python -m benchmarks.plain_autoattack <flags of runner_aa_eval.py, one network, size and norm>

Writes `eval.out`/verdicts.csv: the position and "clean" (misclassified without attack), "broken" or "robust".
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from pyautoattack import AutoAttack

from common.flags import load_config
from evaluation.config import EvalConfig
from evaluation.plan import image_lists
from zoo.description import Preprocessing
from zoo.runs import load_trained


def main(argv: Sequence[str]) -> None:
    """Evaluate on one thread of the CPU (eval.gpus=none) or on the first GPU, in true float32."""
    config = load_config(EvalConfig, argv)
    settings, (entry,) = config.eval, config.networks()
    (norm,), (eps,), (size,) = settings.norms, settings.eps, settings.img_size
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = "cpu" if settings.gpus == "none" else "cuda"

    trained = load_trained(entry.model_in, entry.model)
    model = trained.model.to(device)
    images = image_lists(config)(trained.description["num_classes"], trained.class_names)
    lines = []
    for start in range(0, len(images), settings.batch_size):
        positions = list(range(start, min(start + settings.batch_size, len(images))))
        chunk = images.read(positions, Preprocessing(size, settings.crop_pct))
        engine = AutoAttack(model, norm=norm, eps=eps, seed=settings.seed, device=device, version="standard")
        engine.attacks_to_run = list(settings.chosen)
        x_adv, y_adv = engine.run_standard_evaluation(chunk.x, chunk.y, batch_size=len(chunk.y))
        robust, untouched = y_adv == chunk.y, (x_adv == chunk.x).flatten(1).all(1)
        verdicts = ["robust" if r else "clean" if u else "broken" for r, u in zip(robust, untouched)]
        lines += zip(chunk.positions.tolist(), verdicts)
    folder = Path(settings.out)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "verdicts.csv", "w", newline="") as file:
        csv.writer(file).writerows(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
