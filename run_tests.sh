#!/usr/bin/env bash
# Run the tests. Sets the project up first if need be (see setup_env.sh). The tests need neither network nor GPU.
#
#     bash run_tests.sh                          all but the markers `large` and `slow` (see pyproject.toml)
#     bash run_tests.sh --all                    those too; the same as -m ''
#     bash run_tests.sh tests/attacks -k apgd    pytest's arguments, also after --all; paths start at the project's root
set -euo pipefail

if [[ "${1:-}" == --all ]]; then
    set -- -m "" "${@:2}"
fi

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
PY=$(bash "$root/setup_env.sh")
cd "$root"
# OpenMP's threads spin while they wait, which slows two busy programs on one machine down tenfold; spin only briefly.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"
# timm 1.0.9 uses what newer versions of PyTorch call deprecated: nothing a user can act on.
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning:torch.jit._script}"

# One process a core and one more, as many tests wait for programs that they start; each with one thread. The tests of a file
# stay together, as they share what is slow to make; in the order of the files, as the few tests of some take longest.
cores=$(env -u OMP_NUM_THREADS nproc)  # which would take the threads for the cores
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PY" -m pytest -n $((cores < 4 ? cores + 1 : 4)) --dist loadfile --no-loadscope-reorder "$@"
