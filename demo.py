#!/usr/bin/env python3
"""The demo: adversarial training against AutoAttack's APGD attacks on real handwritten digits, in minutes on a CPU, no download.

    bash run_train.sh

1. Train a small ConvNeXt with ConvStem on scikit-learn's digits, without attack.
2. Train it further against APGD with 2 steps at Linf eps 0.1 (`model.ckpt_path`, eps growing over the first epochs).
3. Attack both with APGD-CE and APGD-T on the held-out digits, and compare.

Leaves in runs/demo: the two run folders, summary.json, test_images.npz (x float32 [N, 3, 32, 32] in [0, 1], y), and
adversarial.png. An earlier runs/demo is renamed, not overwritten. The commands it stands for:

    python train.py --config-file configs/demo_clean.yaml
    python train.py --config-file configs/demo_robust.yaml --model.ckpt_path=<weights of the first>
    python runner_aa_eval.py --config-file configs/demo_eval.yaml --eval.model_in=<run folder>
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train
from attacks.apgd import apgd
from common.config import EvalConfig, TrainConfig, load_config
from common.distributed import Processes
from common.errors import UserError
from common.files import set_aside, writable, write_atomically
from evaluation.evaluate import Images, evaluate, load_images
from evaluation.pictures import draw_examples
from evaluation.report import markdown_table, percent, write_report
from zoo.runs import TrainedModel, find_weights, load_trained

PROJECT = Path(__file__).resolve().parent
FOLDER = PROJECT / "runs" / "demo"
SHOWN = 8  # images in the picture


def main(argv: Sequence[str]) -> int:
    """Run the demo; takes no arguments. Returns the exit status."""
    begin = time.perf_counter()
    try:
        if argv:
            raise UserError(f"demo.py takes no arguments, got {' '.join(argv)}; train.py takes flags.")
        with writable("runs/demo", FOLDER):
            set_aside(FOLDER)
            FOLDER.mkdir(parents=True, exist_ok=True)
        clean = train_model("demo_clean")
        robust = train_model("demo_robust", f"--model.ckpt_path={clean}")
        summary = compare({"clean_model": clean, "robust_model": robust})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    summary["seconds"] = round(time.perf_counter() - begin, 1)
    write_report(FOLDER / "summary.json", summary)
    print(
        f"\n{table(summary)}\n\n{summary['seconds']:.0f} seconds; summary.json, test_images.npz and adversarial.png are in {FOLDER}"
    )
    return 0


def train_model(name: str, *flags: str) -> Path:
    """Train configs/<name>.yaml; returns the weights."""
    flags = ("--config-file", str(PROJECT / "configs" / f"{name}.yaml"), f"--logging.folder={FOLDER}", *flags)
    status = train.main(flags)
    if status != 0:
        raise SystemExit(status)
    return find_weights(FOLDER / load_config(TrainConfig, flags).run_name, flag="logging.folder")


def compare(weights: dict[str, Path]) -> dict[str, Any]:
    """Attack the networks on the same held-out images; writes test_images.npz and adversarial.png."""
    device = Processes.alone().device
    summary: dict[str, Any] = {}
    networks: dict[str, TrainedModel] = {}
    for name, path in weights.items():
        config = load_config(
            EvalConfig, ["--config-file", str(PROJECT / "configs" / "demo_eval.yaml"), f"--eval.model_in={path}"]
        )
        networks[name] = trained = load_trained(path, config.model, flag="eval.model_in")
        images = load_images(config, trained)
        report, _ = evaluate(trained, images, config, device=device)
        (result,) = report["results"]
        summary[name] = {
            "weights": str(path),
            "arch": trained.description["arch"],
            "not_original": int(trained.description["not_original"]),
            "clean_acc": result["clean_acc"],
            "robust_acc": result["robust_acc"],
        }
    save_images(images)
    draw(networks, images, eps=config.eval.eps[0], device=device)
    return summary | {"eps": config.eval.eps[0], "norm": config.eval.norms[0], "n_images": len(images.x)}


def save_images(images: Images) -> None:
    """test_images.npz: what both networks were attacked on."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=images.x.numpy(), y=images.y.numpy())
    write_atomically(FOLDER / "test_images.npz", lambda file: file.write(buffer.getvalue()))


def draw(networks: dict[str, TrainedModel], images: Images, *, eps: float, device: torch.device) -> None:
    """adversarial.png: the first images, and what 50 steps of APGD make of them against each network."""
    x, y = images.x[:SHOWN].to(device), images.y[:SHOWN].to(device)
    attacked = {}
    for name, trained in networks.items():
        x_adv = apgd(trained.model, x, y, norm="Linf", eps=eps, n_iter=50).x_best
        with torch.no_grad():
            predictions = trained.model(x_adv).argmax(dim=1)
        attacked[name.replace("_", " ")] = (x_adv.cpu(), [str(p) for p in predictions.tolist()])
    draw_examples(FOLDER / "adversarial.png", x.cpu(), attacked, [str(label) for label in y.tolist()], eps)


def table(summary: dict[str, Any]) -> str:
    """Clean and robust accuracy of both networks, in Markdown."""
    robust = f"APGD-CE + APGD-T, {summary['norm']} eps {summary['eps']:g}"
    names = {"clean_model": "clean training", "robust_model": "adversarial training (APGD-2)"}
    return markdown_table(
        [
            {"model": label, "clean": percent(summary[name]["clean_acc"]), robust: percent(summary[name]["robust_acc"])}
            for name, label in names.items()
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
