#!/usr/bin/env bash
# Run the tests. Installs the project's packages first if necessary (see setup_env.sh). The tests need no network and no GPU.
#
#     bash run_tests.sh                          all tests except those marked `large` or `slow` (see pyproject.toml)
#     bash run_tests.sh --all                    all tests; the same as -m ''
#     bash run_tests.sh tests/attacks -k apgd    arguments of pytest, also after --all; paths are relative to the project's root
set -euo pipefail

if [[ "${1:-}" == --all ]]; then
    set -- -m "" "${@:2}"
fi

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
PY=$(bash "$root/setup_env.sh")
cd "$root"
# Waiting OpenMP threads spin, which slows down two busy programs on one machine tenfold. Let them spin only briefly.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"
# timm 1.0.9 uses functions that newer PyTorch versions deprecate; users cannot change that.
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning:torch.jit._script}"

# One process per core plus one, because many tests wait for programs that they start; one thread each. The tests of a file run in
# one process, because they share slow fixtures. Files keep their order, because some files with few tests take longest.
cores=$(env -u OMP_NUM_THREADS nproc)  # nproc would return OMP_NUM_THREADS
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PY" -m pytest -n $((cores < 4 ? cores + 1 : 4)) --dist loadfile --no-loadscope-reorder "$@"
