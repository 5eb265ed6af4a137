#!/usr/bin/env bash
# Train. Sets the project up first if need be (see setup_env.sh).
#
#     bash run_train.sh                     the demo: a small adversarial training on real handwritten digits
#     bash run_train.sh --FLAG=VALUE ...    train.py with these flags
#     bash run_train.sh --help              all flags; --check and --where, which start nothing
#
# One process runs for each visible GPU, or a single one if there is none. CUDA_VISIBLE_DEVICES says which are
# visible.
#
#     NGPU=4 bash run_train.sh ...          this number of processes; without GPUs too, then they talk through gloo
#     PYTHON=/path/to/python bash ...       the Python to use, or to make .venv from
#
# Where the command line asks for processes itself (--dist.world_size=N with N > 1) and NGPU is not set, that number
# runs. A world size in a configuration file is not seen here.
#
# Relative paths start where you call it. Exit status: train.py's, 2 if a flag or path is wrong.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
PY=$(bash "$root/setup_env.sh")
# OpenMP's threads spin while they wait, which slows two busy programs on one machine down tenfold; spin only briefly.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"
# timm 1.0.9 uses what newer versions of PyTorch call deprecated: nothing a user can act on.
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning:torch.jit._script}"

if [ $# -eq 0 ]; then
    exec "$PY" "$root/demo.py"
fi

# The value of the last --dist.world_size among the arguments, 1 if there is none.
world_size() {
    local value=1
    while [ $# -gt 0 ]; do
        case $1 in
            --dist.world_size=*) value=${1#*=} ;;
            --dist.world_size) value=${2:-1} ;;
        esac
        shift
    done
    printf '%s\n' "$value"
}

# PyTorch is asked only where there is a driver: importing it takes seconds.
visible_gpus() {
    if command -v nvidia-smi >/dev/null || [ -e /dev/nvidiactl ]; then
        # Where PyTorch cannot use them, train.py says why.
        PYTHONPATH="$root" "$PY" -c 'from common.gpus import usable_gpus; print(usable_gpus())' 2>/dev/null || echo 1
    else
        echo 0
    fi
}

if [ -n "${NGPU:-}" ]; then
    if ! [[ $NGPU =~ ^[1-9][0-9]*$ ]]; then
        echo "NGPU: expected a whole number from 1 on, got '$NGPU'." >&2
        exit 2
    fi
    processes=$NGPU
elif [ "$(world_size "$@")" != 1 ]; then
    processes=1
else
    processes=$(visible_gpus)
fi
if [ "$processes" -gt 1 ]; then
    set -- "$@" --training.distributed=1 --dist.world_size="$processes"
fi
exec "$PY" "$root/train.py" "$@"
