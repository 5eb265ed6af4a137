#!/usr/bin/env bash
# Run a grid of trainings, evaluate it, summarise it. Sets the project up first if need be (see setup_env.sh).
#
#     bash run_ablation.sh configs/ablations/grid_cifar10_cpu.yaml --data.train_dataset=… --data.val_dataset=…
#     bash run_ablation.sh GRID --jobs 8         8 runs at a time, dealt to the visible GPUs, or on the CPU (default: one a GPU, or one)
#     bash run_ablation.sh GRID --check          list the runs
#     bash run_ablation.sh GRID --summary        summarise what is there
#     bash run_ablation.sh --help                all options
#
# Any number of these may work on one grid at once, on machines that share its folder, as a Slurm array does:
#     sbatch --array=1-8 --gres=gpu:1 --cpus-per-task=8 --wrap "bash run_ablation.sh GRID --jobs 4"
#
# Relative paths start where you call it. Exit status: 0 all runs are finished; 1 some failed; 2 wrong input; 130, 143
# interrupted or terminated (runs save their state; the same command resumes).
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
PY=$(bash "$root/setup_env.sh")
# timm 1.0.9 uses what newer versions of PyTorch call deprecated: nothing a user can act on.
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning:torch.jit._script}"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$PY" -m ablation "$@"
