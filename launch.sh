#!/usr/bin/env bash
# The one door: ./launch.sh train | preview | prepare | study CONFIG, chat | evaluate | generate, doctor, dashboard,
# test, lint
#
# Makes .venv beside this file where no virtual environment is active, installs the pinned releases once, and passes all
# arguments on untouched. Training starts one process a GPU, or as many as NUM_PROCESSES says.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

environment() { # the active virtual environment, or .venv
    if [[ -z ${VIRTUAL_ENV:-} && -z ${CONDA_PREFIX:-} ]]; then
        if [[ ! -x $root/.venv/bin/python ]]; then
            python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
                echo "launch.sh: needs Python 3.10 or newer, python3 is $(python3 --version)" >&2
                exit 2
            }
            echo "making $root/.venv" >&2
            python3 -m venv "$root/.venv"
        fi
        source "$root/.venv/bin/activate"
    fi
    prefix=${VIRTUAL_ENV:-$CONDA_PREFIX}
}

install() { # the package with the extras $1, unless that was done since setup.cfg and the pins last changed
    local mark=$prefix/.sft_pipeline-$1
    if [[ $mark -nt $root/setup.cfg && $mark -nt $root/constraints.txt && $(cat "$mark") == "$root" ]]; then return; fi
    echo "installing the pinned releases (once, some minutes)" >&2
    PIP_DISABLE_PIP_VERSION_CHECK=1 python -m pip install --quiet --constraint "$root/constraints.txt" --editable "$root[$1]" >&2
    echo "$root" >"$mark"
}

environment
verb=${1:---help}
if [[ $verb == test ]]; then
    install test
    cd "$root"
    exec python -m pytest "${@:2}"
fi
if [[ $verb == lint ]]; then
    install test,dev
    cd "$root"
    ruff check
    ruff format --check
    exec mypy
fi
extras=lora,plot
if [[ $verb == dashboard || " $* " == *" --report_to"* ]]; then extras+=,track; fi
install "$extras"
if [[ $verb == train ]]; then
    processes=${NUM_PROCESSES:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
    if [[ $processes -gt 1 ]]; then
        threads=$(python -c "import os; print(max(1, (os.cpu_count() or 1) // $processes))")
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads} # torchrun would take one
        exec python -m sft_pipeline.launch --nproc_per_node "$processes" -m sft_pipeline "$@"
    fi
fi
exec python -m sft_pipeline "$@"
