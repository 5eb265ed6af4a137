#!/usr/bin/env bash
# Evaluate checkpoints with AutoAttack. Sets the project up first if need be (see setup_env.sh).
#
#     bash run_eval.sh                       how to call it
#     bash run_eval.sh --FLAG VALUE ...      runner_aa_eval.py with these flags
#
# Relative paths in flags start at the project's root.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
PY=$(bash "$root/setup_env.sh")
cd "$root"
# OpenMP's threads spin while they wait, which slows two busy programs on one machine down tenfold; spin only briefly.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"

if [ $# -eq 0 ]; then
    exec "$PY" runner_aa_eval.py --help
fi
exec "$PY" runner_aa_eval.py "$@"
