#!/usr/bin/env python3
"""Adversarial training of image classifiers.

Every flag is `--section.name=value` (`--section.name value` works too); `--help` lists them, `--config-file FILE` reads them
from YAML, and flags override the file. Errors of input end with exit status 2, a diverged run with 3.

    python train.py --config-file configs/convnext_tiny_cvst.yaml --data.train_dataset=/data/imagenet …
    python train.py … --training.distributed=1 --dist.world_size=8      eight processes on this machine
    torchrun --nproc_per_node=8 train.py …                              the same, started by torchrun (several machines too)
    bash run_train.sh …                                                 sets up, checks, and takes all visible GPUs
    python train.py --check …                                           looks at flags, files and folders, starts nothing

A run: images in [0, 1] → mixup → attack on the network in eval mode → forward, loss, backward → optimiser → EMA; after every
epoch validation on clean and attacked images; weights and log in <logging.folder>/<run name>.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from common.config import TrainConfig, load_config
from common.distributed import Processes, check_processes, check_rendezvous, launch, under_torchrun
from common.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Run one command line (without the program's name); returns the exit status."""
    arguments = [a for a in argv if a != "--check"]
    try:
        config = load_config(TrainConfig, arguments)
        if len(arguments) < len(argv):
            check(config)
            return 0
        return launch(
            train, config, world_size=config.dist.world_size, address=config.dist.address, port=config.dist.port
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def train(config: TrainConfig, processes: Processes) -> None:
    """One process of the run."""
    from training.trainer import Diverged, Trainer

    try:
        Trainer(config, processes).run()
    except Diverged as error:
        print(f"error: process {processes.rank}: {error}", file=sys.stderr)
        raise SystemExit(3) from error


def check(config: TrainConfig) -> None:
    """Raise the UserError that starting this run would meet: data folders, classes, architecture, weights, processes."""
    import torch

    from common.files import writable
    from training.build import build_state, build_train_loader, check_image_sizes, open_sources
    from utils_architecture import check_pretrained
    from zoo.names import split_kind
    from zoo.published import find_published

    world_size = check_processes(config.dist.world_size)
    if config.dist.world_size > 1 and not under_torchrun():
        check_rendezvous(config.dist.address, config.dist.port)
    if config.model.pretrained and not config.model.ckpt_path:
        check_pretrained(config.model.arch)
    with writable("logging.folder", folder := Path(config.logging.folder)):
        folder.mkdir(parents=True, exist_ok=True)
    # Nothing is loaded into memory and nothing downloaded for a check.
    start = config.model.ckpt_path
    known = not Path(start).exists() and find_published(split_kind(start)[0]) is not None
    quick = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, in_memory=False),
        model=dataclasses.replace(config.model, pretrained=False, ckpt_path="" if known else start),
    )
    train_source, _ = open_sources(quick)
    build_train_loader(quick, train_source, Processes(rank=0, world_size=world_size, device=torch.device("cpu")))
    check_image_sizes(build_state(quick, Processes.alone("cpu")).model, quick)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
