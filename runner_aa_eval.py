#!/usr/bin/env python3
"""AutoAttack on a trained network: clean and robust accuracy under Linf, L2 and L1.

    python runner_aa_eval.py --eval.model_in=runs/<run> --data.val_dataset=/data/imagenet --eval.fullaa=1 --eval.norms=Linf,L2,L1
    python runner_aa_eval.py --eval.model_in=weights.pt --model.arch=convnext_base --model.not_original=1 --data.val_dataset=…
    bash run_eval.sh …                                   the same, after setting up

`eval.model_in` is a weights file or a run folder. The architecture comes from the run's params.json; flags override it and
are needed for a bare file. Writes report.json into `eval.out` and prints a table; `--help` lists the flags. Errors of input
end with exit status 2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from common.config import EvalConfig, load_config
from common.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Run one command line (without the program's name); returns the exit status."""
    try:
        run(load_config(EvalConfig, argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(config: EvalConfig) -> Path:
    """Evaluate and report; returns the report's path."""
    from common.distributed import Processes
    from common.files import set_aside, writable
    from evaluation.evaluate import evaluate, load_images
    from evaluation.report import markdown_table, percent, show_eps, write_report
    from zoo.runs import load_trained

    trained = load_trained(config.eval.model_in, config.model, flag="eval.model_in")
    out = Path(config.eval.out) if config.eval.out else trained.path.parent / f"eval_{trained.path.stem}"
    images = load_images(config, trained)
    with writable("eval.out", out):
        out.mkdir(parents=True, exist_ok=True)
    report, _ = evaluate(trained, images, config, device=Processes.alone().device)
    with writable("eval.out", out):
        set_aside(out / "report.json")
        write_report(out / "report.json", report)
    rows = [
        {"norm": r["norm"], "eps": show_eps(r["eps"]), "images": r["n"], "clean": percent(r["clean_acc"])}
        | {attack: percent(acc) for attack, acc in r["acc_after"].items()}
        | {"robust": percent(r["robust_acc"]), "seconds": f"{r['seconds']:.0f}"}
        for r in report["results"]
    ]
    print(markdown_table(rows))
    print(f"report: {out / 'report.json'}")
    return out / "report.json"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
