#!/usr/bin/env python3
"""Demo of adversarial training against AutoAttack's APGD attacks on handwritten digits, in minutes on a CPU, without download.

    bash run_train.sh

1. Train a small ConvNeXt with ConvStem on scikit-learn's digits, without attack.
2. Continue training it against APGD with 2 steps at Linf eps 0.1 (`model.ckpt_path`, eps grows over the first epochs).
3. Attack both networks with APGD-CE and APGD-T on the held-out digits, and compare them.

Results in runs/demo: the two run folders, networks.yaml that lists them, eval/ with the reports of the attacks, summary.json,
test_images.npz (x float32 [N, 3, 32, 32] in [0, 1], y), and adversarial.png. An earlier runs/demo is renamed, not
overwritten. The demo corresponds to these commands:

    python train.py --config-file configs/demo_clean.yaml
    python train.py --config-file configs/demo_robust.yaml --model.ckpt_path=<weights of the first>
    python runner_aa_eval.py --config-file configs/demo_eval.yaml --eval.models=runs/demo/networks.yaml
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import train
from common.errors import UserError
from common.files import set_aside, writable, write_atomically
from common.flags import load_config
from common.processes import Processes
from common.tables import markdown_table
from evaluation.config import EvalConfig
from evaluation.evaluate import run_evaluations
from evaluation.pictures import draw_examples
from evaluation.plan import image_lists
from evaluation.report import percent, write_json, write_text
from training.config import TrainConfig
from zoo.description import Preprocessing
from zoo.runs import find_weights

PROJECT = Path(__file__).resolve().parent
FOLDER = Path("runs", "demo").absolute()  # where the user stands
NAMES = {"clean_model": "clean training", "robust_model": "adversarial training (APGD-2)"}
CLASSES = 10


def main(argv: Sequence[str]) -> int:
    """Run the demo without arguments; return the exit status."""
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
    write_json(FOLDER / "summary.json", summary)
    print(
        f"\n{table(summary)}\n\n{summary['seconds']:.0f} seconds; summary.json, test_images.npz and adversarial.png are in {FOLDER}"
    )
    return 0


def train_model(name: str, *flags: str) -> Path:
    """Train configs/<name>.yaml; return the path of the weights."""
    flags = ("--config-file", str(PROJECT / "configs" / f"{name}.yaml"), f"--logging.folder={FOLDER}", *flags)
    status = train.main(flags)
    if status != 0:
        raise SystemExit(status)
    return find_weights(FOLDER / load_config(TrainConfig, flags).run_name)


def compare(weights: Mapping[str, Path]) -> dict[str, Any]:
    """Attack the networks on the same held-out images; write networks.yaml, test_images.npz and adversarial.png."""
    networks = [{"name": NAMES[name], "model_in": str(path)} for name, path in weights.items()]
    write_text(FOLDER / "networks.yaml", yaml.safe_dump(networks, sort_keys=False))
    flags = ("--config-file", str(PROJECT / "configs" / "demo_eval.yaml"), f"--eval.models={FOLDER / 'networks.yaml'}")
    # nvidia-smi may still report the training that has just ended.
    config = load_config(EvalConfig, [*flags, f"--eval.out={FOLDER / 'eval'}", "--eval.gpu_wait=1"])
    outcome = run_evaluations(config, Processes.alone())
    save_images(config)
    draw({e.network: e.folder for e in outcome.evaluations})
    summary: dict[str, Any] = {}
    for name, report in zip(weights, outcome.reports):
        summary[name] = {
            "weights": str(weights[name]),
            "arch": report["network"]["arch"],
            "not_original": int(report["network"]["not_original"]),
            "clean_acc": report["clean_acc"],
            "robust_acc": report["robust_acc"],
        }
    return summary | {"eps": config.eval.eps[0], "norm": config.eval.norms[0], "n_images": outcome.reports[0]["n"]}


def save_images(config: EvalConfig) -> None:
    """Write the images that both networks were attacked on to test_images.npz."""
    (size,) = config.eval.img_size
    images = image_lists(config)(CLASSES, None)
    chunk = images.read(list(range(len(images))), Preprocessing(size, config.eval.crop_pct))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=chunk.x.numpy(), y=chunk.y.numpy())
    write_atomically(FOLDER / "test_images.npz", lambda file: file.write(buffer.getvalue()))


def draw(folders: Mapping[str, Path]) -> None:
    """Draw the first images, and their adversarial versions for each network, into adversarial.png."""
    attacked = {}
    for name, folder in folders.items():
        with np.load(folder / "chunks" / "00000.npz") as arrays:
            x, y, attacked[name] = arrays["x"], arrays["y"], (arrays["x_adv"], arrays["broken_by"].tolist())
    draw_examples(FOLDER / "adversarial.png", x, attacked, labels=[str(label) for label in y])


def table(summary: dict[str, Any]) -> str:
    """Return a Markdown table with clean and robust accuracy of both networks."""
    robust = f"APGD-CE + APGD-T, {summary['norm']} eps {summary['eps']:g}"
    return markdown_table(
        [
            {"model": label, "clean": percent(summary[name]["clean_acc"]), robust: percent(summary[name]["robust_acc"])}
            for name, label in NAMES.items()
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
