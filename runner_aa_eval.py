#!/usr/bin/env python3
"""AutoAttack on trained networks: clean and robust accuracy under Linf, L2 and L1, on all free GPUs.

    python runner_aa_eval.py --eval.model_in=runs/<run> --data.val_dataset=/data/imagenet --eval.fullaa=1 --eval.norms=Linf,L2,L1
    python runner_aa_eval.py --eval.model_in=weights.pt --model.arch=convnext_base --model.not_original=1 --data.val_dataset=…
    python runner_aa_eval.py convnext_base_cvst --data.val_dataset=/data/imagenet     a published model; compares the numbers
    python runner_aa_eval.py --eval.models=networks.yaml --eval.img_size=224,256 --data.val_dataset=…     several networks
    torchrun --nnodes=… --nproc-per-node=gpu … runner_aa_eval.py …                                        several machines
    bash run_eval.sh …                                   the same, after installation

`eval.model_in`, or the words before the first flag, lists weights files, run folders, published models or RobustBench ids.
The architecture comes from the run's params.json, the published table, or the weights file; flags must agree with it. The
images are attacked in chunks. Each free GPU (or CPU process) takes the next open chunk. To resume after an interruption,
start the same command again, with any number of GPUs; finished chunks are not computed again.

For each network, image size and norm, report.json, verdicts.csv, log.txt and pictures are written to `eval.out`. A table of all
is printed. `--help` lists the flags. Exit status: 0; 2 wrong input; 1 a chunk failed three times; 130, 143 interrupted, terminated.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from common.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Run one command line (without the program name) and return the exit status."""
    from common.flags import load_config
    from evaluation.config import EvalConfig
    from evaluation.workqueue import TaskFailed, prepare_workers

    warnings.filterwarnings("ignore", ".*torch.jit.*", FutureWarning)  # raised inside timm
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning:torch.jit._script")  # the same, for the workers
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # `finally` stops workers
    try:
        config = load_config(EvalConfig, with_flag(argv))
        prepare_workers("evaluation.worker")  # imports PyTorch in parallel with this process

        import torch

        from common.processes import joined
        from evaluation.evaluate import run_evaluations

        with joined(device=torch.device("cpu")) as processes:  # the workers open the GPUs
            run_evaluations(config, processes)
    except UserError as error:
        say(f"error: {error}")
        return 2
    except TaskFailed as error:
        say(f"error: {error}\nFinished chunks are kept; the same command resumes with the remaining ones.")
        return 1
    except KeyboardInterrupt:
        print("interrupted; finished chunks are kept, the same command resumes.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def with_flag(argv: Sequence[str]) -> list[str]:
    """Return the command line with `--eval.model_in` in place of the words before the first flag, such as a shell's `runs/*`."""
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    return [*([f"--eval.model_in={','.join(words)}"] if words else []), *argv[len(words) :]]


def say(text: str) -> None:
    """Print a message that all processes of torchrun have, once."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal with few characters must not fail on the table
    sys.exit(main(sys.argv[1:]))
