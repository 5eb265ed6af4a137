#!/usr/bin/env bash
# Find or create a Python that can run this project, and print its path. The launchers call it:
#
#     PY=$(bash setup_env.sh)
#
# 1. If PYTHON=... meets requirements.txt, it is used unchanged. Without PYTHON, the same holds for python3 (of the
#    active virtualenv or conda environment, if any).
# 2. Otherwise .venv in the project's root is used. If it does not meet requirements.txt yet, the script creates it
#    from PYTHON or from the newest Python 3.10 to 3.12 on the PATH, and installs the versions of constraints.txt.
#    Only this step needs the network.
#
# The script checks the installed packages, not only whether a folder exists. The next call restarts an interrupted
# installation from scratch, and concurrent calls wait for one another. This script owns .venv: install other packages
# into a separate environment.
#
# Exit status: 0 with the path on standard output, 2 if PYTHON is unusable, 1 if the installation fails.
set -euo pipefail

say() { printf 'setup: %s\n' "$*" >&2; }

# Print the absolute path of PYTHON, which may be relative to the caller's folder.
resolve_python() {
    local path
    if ! path=$(type -P "$PYTHON"); then
        say "PYTHON=$PYTHON is neither a command nor an executable file."
        exit 2
    fi
    case $path in
        /*) printf '%s\n' "$path" ;;
        *) printf '%s\n' "$PWD/$path" ;;
    esac
}

# Does interpreter $1 meet requirements.txt? Unmet requirements are printed to standard error.
meets_requirements() { "$1" -m common.check_requirements requirements.txt </dev/null; }

# .venv is ready only if its installation completed.
venv_is_ready() {
    [ ! -e .venv.incomplete ] && [ -x "$venv_python" ] && meets_requirements "$venv_python" 2>/dev/null
}

# Can interpreter $1 create a .venv for the pinned packages?
can_make_venv() {
    "$1" -c 'import ensurepip, venv, sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
        </dev/null >/dev/null 2>&1
}

# Try every match on the PATH: the first may be a version manager's placeholder that does not run.
find_base_python() {
    local name path
    for name in python3.12 python3.11 python3.10 python3; do
        while IFS= read -r path; do
            if can_make_venv "$path"; then
                printf '%s\n' "$path"
                return
            fi
        done < <(type -aP "$name")
    done
    say "found no Python 3.10, 3.11 or 3.12 with the modules venv and ensurepip on the PATH. Install one" \
        "(Debian, Ubuntu: apt-get install python3-venv) or set PYTHON=/path/to/python3.11"
    return 1
}

install_venv() {
    say "installing PyTorch and the other packages of requirements.txt into $root/.venv" \
        "(once; about 3 GB to download, 6 GB on disk, 2 to 10 minutes) ..."
    if [ -e .venv.incomplete ] || ! "$venv_python" -m pip --version >/dev/null 2>&1; then
        touch .venv.incomplete
        "$base" -m venv --clear .venv >&2
    fi
    touch .venv.incomplete
    if ! "$venv_python" -m pip install --disable-pip-version-check --no-input --progress-bar off \
        -r requirements.txt -c constraints.txt </dev/null >.venv/pip.log 2>&1; then
        tail -n 15 .venv/pip.log >&2
        say "the installation failed. pip's last lines are above; the full output is in $root/.venv/pip.log." \
            "The next start tries again. It needs a connection to PyPI and 10 GB of free disk space."
        return 1
    fi
    if ! meets_requirements "$venv_python"; then
        say "pip succeeded, but $root/.venv does not meet requirements.txt (see above)."
        return 1
    fi
    rm .venv.incomplete
    say "done."
}

python=
if [ -n "${PYTHON:-}" ]; then
    python=$(resolve_python)
fi
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
cd "$root"
venv_python=$root/.venv/bin/python

if [ -n "$python" ]; then
    if reasons=$(meets_requirements "$python" 2>&1); then
        printf '%s\n' "$python"
        exit
    fi
    say "PYTHON=$PYTHON does not meet requirements.txt (${reasons##*$'\n'}), so .venv is used."
elif python3=$(type -P python3) && meets_requirements "$python3" 2>/dev/null; then
    printf '%s\n' "$python3"
    exit
fi

if ! venv_is_ready; then
    # The lock is released when this script ends, and any pip that outlives it.
    exec 9>.venv.lock
    flock --nonblock 9 || { say "waiting for another process that is installing ..."; flock 9; }
    if ! venv_is_ready; then
        if [ -z "$python" ]; then
            base=$(find_base_python)
        elif can_make_venv "$python"; then
            base=$python
        else
            say "PYTHON=$PYTHON cannot create the project's .venv: expected Python 3.10, 3.11 or 3.12 with the modules" \
                "venv and ensurepip, got $("$python" --version 2>&1 | head -n 1)."
            exit 2
        fi
        install_venv
    fi
fi
printf '%s\n' "$venv_python"
