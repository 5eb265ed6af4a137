#!/usr/bin/env bash
# Evaluate checkpoints with AutoAttack. Sets the project up first if need be (see setup_env.sh).
#
#     bash run_eval.sh                       the demo's two networks under Linf, L2 and L1 (trains them first, if need be)
#     bash run_eval.sh --FLAG VALUE ...      runner_aa_eval.py with these flags; --help lists them
#
# Relative paths start where you call it.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
PY=$(bash "$root/setup_env.sh")
# OpenMP's threads spin while they wait, which slows two busy programs on one machine down tenfold; spin only briefly.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"
# timm 1.0.9 uses what newer versions of PyTorch call deprecated: nothing a user can act on.
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning:torch.jit._script}"

if [ $# -eq 0 ]; then
    if [ ! -e runs/demo/networks.yaml ]; then
        echo "run_eval.sh: no demo networks yet: training them first (a few minutes)." >&2
        "$PY" "$root/demo.py"
    fi
    set -- --config-file "$root/configs/demo_norms.yaml"
fi
exec "$PY" "$root/runner_aa_eval.py" "$@"
