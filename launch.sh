#!/usr/bin/env bash
# Runs every command of the project in its virtual environment:
#     ./launch.sh COMMAND [ARGUMENTS]    train, preview, prepare, chat, generate, evaluate, ...: ./launch.sh --help
#     ./launch.sh --config_file FILE train CONFIG    the processes of a config file of accelerate (configs/accelerate)
#     ./launch.sh test | lint            the tests; ruff and mypy
#
# On a Slurm cluster, from this folder (docs/slurm.md); options given to sbatch override those below:
#     sbatch --nodes 2 --gpus-per-node 8 --ntasks-per-node 8 launch.sh train CONFIG
#SBATCH --job-name=sft_pipeline
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
#
# Creates .venv beside this file if no virtual environment is active, installs the pinned releases the first time, and
# passes all arguments on unchanged. Training starts one process per GPU, as many as FILE says, or NUM_PROCESSES.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ ! -f $root/setup.cfg ]]; then root=${SLURM_SUBMIT_DIR:-$root}; fi # sbatch runs a copy elsewhere
if [[ ! -f $root/setup.cfg ]]; then
    echo "launch.sh: $root is not the project folder; cd to the folder of launch.sh, then run sbatch launch.sh" >&2
    exit 2
fi

environment() { # use the active virtual environment, or .venv
    if [[ -z ${VIRTUAL_ENV:-} && -z ${CONDA_PREFIX:-} ]]; then
        if [[ ! -x $root/.venv/bin/python ]]; then
            python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
                echo "launch.sh: needs Python 3.11 or newer, python3 is $(python3 --version)" >&2
                exit 2
            }
            echo "creating $root/.venv" >&2
            python3 -m venv "$root/.venv"
        fi
        source "$root/.venv/bin/activate"
    fi
    prefix=${VIRTUAL_ENV:-$CONDA_PREFIX}
}

install() { # install the package with the extras $1, unless that was done since setup.cfg and constraints.txt changed
    local mark=$prefix/.sft_pipeline-$1
    if [[ $mark -nt $root/setup.cfg && $mark -nt $root/constraints.txt && $(cat "$mark") == "$root" ]]; then return; fi
    echo "installing the pinned releases (first time only, some minutes)" >&2
    PIP_DISABLE_PIP_VERSION_CHECK=1 python -m pip install --quiet --constraint "$root/constraints.txt" --editable "$root[$1]" >&2
    echo "$root" >"$mark"
}

once() { # print each error line once, though every process prints it; print all other lines unchanged
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

slurm() { # train, a process or with FILE a launcher per task; on SIGTERM save and requeue the job, which resumes
    local step told=yes status
    local task='if [[ $SLURM_NTASKS -gt 1 ]]; then
            export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
        fi
        exec python -m sft_pipeline "$@"'
    read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
    if [[ ${SLURM_RESTART_COUNT:-0} -gt 0 ]]; then set -- "$@" --resume_from_checkpoint auto; fi
    if [[ $config_file ]]; then
        task='exec python -m sft_pipeline.training.launch --machine_rank "$SLURM_PROCID" "$@"'
        set -- --config_file "$config_file" ${NUM_PROCESSES:+--num_processes "$NUM_PROCESSES"} \
            --num_machines "$SLURM_NTASKS" --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \
            -m sft_pipeline "$@"
    fi
    # Status 75: the process got SIGTERM and has saved. srun must not kill the others, which are still saving.
    { srun --kill-on-bad-exit=0 bash -c "$task" bash "$@" 2>&1 >&3 | once >&2; } 3>&1 &
    step=$!
    trap 'told=yes; scancel --quiet --signal=TERM "$SLURM_JOB_ID" || true' TERM # srun would kill its tasks
    while [[ $told ]]; do # the signal interrupts `wait`
        told="" status=0
        wait "$step" || status=$?
    done
    # Not if the job was cancelled or is already requeued: its state is then not RUNNING.
    if [[ $status == 75 && $(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T) == RUNNING ]]; then
        scontrol requeue "$SLURM_JOB_ID" || true # fails for an interactive job
    fi
    exit "$status"
}

config_file=""
if [[ ${1:-} == --config_file ]]; then
    if [[ ${3:-} != train ]]; then
        echo "launch.sh: expected --config_file FILE train CONFIG; other commands run in one process" >&2
        exit 2
    fi
    config_file=$2
    shift 2
fi
environment
verb=${1:---help}
if [[ $verb == test ]]; then
    install test,dev
    cd "$root"
    # Two processes compute side by side: more threads than cores would slow both down.
    export OMP_NUM_THREADS=1
    # loadfile: all tests of a file run in one process, as they share fixtures. `-n 0` runs everything in this process.
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
needs() { # whether an option of the command $2..., or a key of its config $3, matches $1
    [[ " ${*:2} " =~ \ --($1) ]] || grep -qsE "^($1)" -- "${3:-}"
}
if [[ $verb == dashboard ]] || needs 'report_to.*trackio' "$@"; then extras+=,track; fi
if needs 'tasks|eval_tasks' "$@"; then extras+=,harness; fi
if needs 'load_in_[48]bit' "$@"; then extras+=,qlora; fi
install "$extras"
if [[ $verb == train ]]; then
    # In the script of a Slurm job, not in a step of it, which srun has already started.
    if [[ -n ${SLURM_JOB_ID:-} && -z ${SLURM_STEP_ID:-} ]]; then slurm "$@"; fi
    if [[ $config_file ]]; then
        exec python -m sft_pipeline.training.launch --config_file "$config_file" \
            ${NUM_PROCESSES:+--num_processes "$NUM_PROCESSES"} -m sft_pipeline "$@"
    fi
    processes=${NUM_PROCESSES:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
    if [[ $processes -gt 1 ]]; then
        threads=$(python -c "import os; print(max(1, (os.cpu_count() or 1) // $processes))")
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads} # torchrun would set 1
        exec python -m sft_pipeline.training.launch --nproc_per_node "$processes" -m sft_pipeline "$@"
    fi
fi
exec python -m sft_pipeline "$@"
