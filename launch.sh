#!/usr/bin/env bash
# The one door: ./launch.sh train | preview | prepare | study CONFIG, chat | evaluate | generate, doctor, dashboard,
# test, lint
#
# On a cluster, from this folder (docs/slurm.md); sbatch's own options win over those below:
#     sbatch --nodes 2 --gpus-per-node 8 --ntasks-per-node 8 launch.sh train CONFIG
#SBATCH --job-name=sft_pipeline
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
#
# Makes .venv beside this file where no virtual environment is active, installs the pinned releases once, and passes all
# arguments on untouched. Training starts one process a GPU, or as many as NUM_PROCESSES says.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ ! -f $root/setup.cfg ]]; then root=${SLURM_SUBMIT_DIR:-$root}; fi # sbatch runs a copy of this file
if [[ ! -f $root/setup.cfg ]]; then
    echo "launch.sh: $root does not hold the project; cd to the folder of launch.sh, then sbatch launch.sh" >&2
    exit 2
fi

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

once() { # a line of error that every process says; all other lines as they come
    local line
    local -A said
    trap '' TERM
    while IFS= read -r line || [[ $line ]]; do
        if [[ $line == "sft-pipeline: "* ]]; then
            if [[ ${said[$line]:-} ]]; then continue; fi
            said[$line]=yes
        fi
        printf '%s\n' "$line"
    done
}

slurm() { # training, one process a task of the job; told to end, it saves, and the job is requeued and goes on
    local step told=yes status
    local task='if [[ $SLURM_NTASKS -gt 1 ]]; then
            export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
        fi
        exec python -m sft_pipeline "$@"'
    read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
    if [[ ${SLURM_RESTART_COUNT:-0} -gt 0 ]]; then set -- "$@" --resume_from_checkpoint auto; fi
    # 75 is the status of a process that was told to end and has saved: no reason to kill those that are still at it.
    { srun --kill-on-bad-exit=0 bash -c "$task" bash "$@" 2>&1 >&3 | once >&2; } 3>&1 &
    step=$!
    trap 'told=yes; scancel --quiet --signal=TERM "$SLURM_JOB_ID" || true' TERM # srun itself would kill them
    while [[ $told ]]; do # the signal ends `wait` early
        told="" status=0
        wait "$step" || status=$?
    done
    # A job that was cancelled, or is requeued already, is not running any more.
    if [[ $status == 75 && $(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T) == RUNNING ]]; then
        scontrol requeue "$SLURM_JOB_ID" || true # not a batch job
    fi
    exit "$status"
}

environment
verb=${1:---help}
if [[ $verb == test ]]; then
    install test,dev
    cd "$root"
    # Two processes compute side by side: threads of theirs would wait for each other.
    export OMP_NUM_THREADS=1
    # A file's tests stay in one process, which makes what they share once; `-n 0` runs them in this one.
    exec python -m pytest --numprocesses auto --maxprocesses 2 --dist loadfile --no-loadscope-reorder "${@:2}"
fi
if [[ $verb == lint ]]; then
    install test,dev
    cd "$root"
    ruff check
    ruff format --check
    exec mypy
fi
extras=lora,plot,judge
if [[ $verb == dashboard || " $* " == *" --report_to"* ]]; then extras+=,track; fi
install "$extras"
if [[ $verb == train ]]; then
    # In a job's script; not in a step of it, which srun has started already.
    if [[ -n ${SLURM_JOB_ID:-} && -z ${SLURM_STEP_ID:-} ]]; then slurm "$@"; fi
    processes=${NUM_PROCESSES:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
    if [[ $processes -gt 1 ]]; then
        threads=$(python -c "import os; print(max(1, (os.cpu_count() or 1) // $processes))")
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads} # torchrun would take one
        exec python -m sft_pipeline.training.launch --nproc_per_node "$processes" -m sft_pipeline "$@"
    fi
fi
exec python -m sft_pipeline "$@"
