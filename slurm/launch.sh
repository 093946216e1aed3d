# shellcheck shell=bash
# What all launchers of this folder do: check, submit, start one torchrun a node, pass signals on, requeue.
#
# A launcher sources this file and calls launch_train or launch_eval. Under srun the file is run with `node`, which
# starts torchrun, and under torchrun with `rank`, which starts one training process. docs/scaling.md explains the use.
set -euo pipefail

STOPPED=75    # a run that was asked to stop, has saved, and can be continued: common/engine/preemption.py
BAD_INPUT=2

fail() {
    echo "error: $*" >&2
    exit "$BAD_INPUT"
}

launch_train() { # TASK RECIPE [OPTION…]
    local task=$1 recipe=$1/recipes/$2.yaml name=$2 options
    shift 2
    [ -n "$name" ] || fail "MODEL is missing; recipes: $(recipes "$task")"
    [ -f "$recipe" ] || fail "$recipe does not exist; recipes: $(recipes "$task")"
    refuse_out "$@"
    find_data "$(data_variable "$name")"
    enter_environment
    submit_unless_in_a_job
    run=${OUT:-${RUNS:-runs}/$name}${SLURM_ARRAY_TASK_ID:+/seed-$SLURM_ARRAY_TASK_ID}
    options=("--config=$recipe" "--data.path=$data" "$@" "--out=$run")
    # The seed comes last, so that it is always the one that the folder is named after.
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || options+=("--train.seed=$SLURM_ARRAY_TASK_ID")
    leave_if_finished
    mkdir -p "$run" 2>/dev/null || fail "RUNS or OUT: $run cannot be made"
    count_restarts
    if on_every_node "$run/logs" "$task/train.py" "${options[@]}"; then
        touch "$run/.finished"
    else
        requeue $?
    fi
}

launch_eval() { # TASK RUN-or-WEIGHTS [OPTION…]
    local task=$1 weights=$2
    shift 2
    [ -n "$weights" ] || fail "RUN is missing: a run's folder, one of its checkpoints, or a file of weights"
    [ -e "$weights" ] || fail "$weights does not exist; expected a run's folder, a checkpoint, or a file of weights"
    [ -f "$task/eval.py" ] || fail "$task/eval.py does not exist"
    [ -z "${DATA:-}" ] || find_data DATA # else the run's own data
    enter_environment
    submit_unless_in_a_job
    on_every_node "${RUNS:-runs}/logs" "$task/eval.py" "$weights" ${DATA:+"--data.path=$DATA"} "$@"
}

# ---- checks, before a job takes a GPU where the launcher is called by bash, and first thing in the job where by sbatch

read_site() { # slurm/site.env, without overriding what the environment says already
    local line number=0 site=slurm/site.env name
    [ -f "$site" ] || return 0
    local assignment='^([A-Za-z_][A-Za-z0-9_]*)=("[^"]*"|'"'[^']*'"'|[^[:space:]"'"'"'`$;&|<>()]*)[[:space:]]*(#.*)?$'
    while IFS= read -r line || [ -n "$line" ]; do
        number=$((number + 1))
        [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
        [[ $line =~ $assignment ]] || fail "$site, line $number: expected NAME=value or NAME=\"value\": $line"
        name=${BASH_REMATCH[1]}
        [ -n "${!name+set}" ] || eval "export ${BASH_REMATCH[1]}=${BASH_REMATCH[2]}"
    done <"$site"
}

recipes() {
    local names=("$1"/recipes/*.yaml)
    names=("${names[@]##*/}")
    echo "${names[*]%.yaml}"
}

refuse_out() {
    local option
    for option in "$@"; do
        case $option in --out | --out=*) fail "--out: name the run's folder by OUT=FOLDER or RUNS=FOLDER instead" ;; esac
    done
}

data_variable() { # RECIPE
    case $1 in
        c2d* | i3d*) echo KINETICS ;;
        *_cifar100) echo CIFAR100 ;;
        *_cifar10) echo CIFAR10 ;;
        *) echo IMAGENET ;;
    esac
}

find_data() { # VARIABLE; sets data
    data=${DATA:-${!1:-}}
    [ -n "$data" ] || fail "no data: set DATA, or $1 in slurm/site.env, to where it lies (docs/data.md)"
    [ -e "$data" ] || fail "the data's path $data (DATA or $1) does not exist"
}

enter_environment() {
    local venv=${VENV:-.venv}
    if [ -n "${MODULES:-}" ]; then
        type module >/dev/null 2>&1 || fail "MODULES=$MODULES: there is no module command here"
        # shellcheck disable=SC2086  # a list of names
        module load $MODULES || fail "MODULES=$MODULES: module load failed"
    fi
    read -ra container <<<"${CONTAINER:-}"
    if [ ${#container[@]} -gt 0 ]; then
        type "${container[0]}" >/dev/null 2>&1 || fail "CONTAINER: there is no command ${container[0]} here"
    else
        [ -x "$venv/bin/python" ] || fail "VENV: $venv/bin/python does not exist; \`make setup\` makes .venv"
        PATH=$(cd "$venv" && pwd)/bin:$PATH
    fi
}

submit_unless_in_a_job() {
    [ -z "${SLURM_JOB_ID:-}" ] || return 0
    local options
    read -ra options <<<"${SBATCH_OPTIONS:-}"
    type sbatch >/dev/null 2>&1 || fail "there is no sbatch here: call this on a machine of the SLURM cluster"
    exec sbatch "${options[@]}" "$launcher" "${arguments[@]}"
}

# ---- on the first node, in the batch script

on_every_node() { # LOGS SCRIPT [OPTION…]; returns the script's exit code
    local first srun
    [ -n "${PROCESSES:-${SLURM_GPUS_ON_NODE:-}}" ] ||
        fail "this job has no GPU: give --gres=gpu:N, or PROCESSES=N to run N processes a node on the CPU"
    read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR=$first MASTER_PORT=$((20000 + (SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0}) % 10000))
    export LOGS="$1/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" PYTHONUNBUFFERED=1
    shift
    mkdir -p "$LOGS"
    echo "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $SLURM_NNODES nodes × ${PROCESSES:-$SLURM_GPUS_ON_NODE}" \
        "processes, logs in $LOGS"
    # After the first node has ended the others get a minute: nothing hangs on a node that has died.
    srun --ntasks-per-node=1 --ntasks="$SLURM_NNODES" ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
        --kill-on-bad-exit=0 --wait=60 bash slurm/launch.sh node "$@" &
    srun=$!
    while kill -0 "$srun" 2>/dev/null; do
        wait "$srun" || true # returns early when a signal comes
        # USR1 also where it was TERM: srun passes USR1 on and takes TERM for an order to kill. Again and again, because
        # a process that is still starting ignores it.
        while [ -n "$asked" ] && kill -USR1 "$srun" 2>/dev/null; do sleep 2 || true; done
    done
    wait "$srun"
}

newest_step() {
    local steps=("$run"/checkpoints/step-*)
    echo "${steps[-1]##*/}"
}

leave_if_finished() {
    if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -f "$run/.finished" ]; then
        echo "$run has finished already"
        exit 0
    fi
    rm -f "$run/.finished"
}

count_restarts() { # stops a job that is restarted again and again and comes no further
    local limit=${MAX_RESTARTS:-3} before='' count=0 newest
    newest=$(newest_step)
    if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -f "$run/.restarts" ]; then
        read -r before count <"$run/.restarts"
        if [ "$before" = "$newest" ]; then count=$((count + 1)); else count=0; fi
    fi
    if [ "$count" -gt "$limit" ]; then
        echo "error: $limit restarts without a new checkpoint in $run: not started again; see $run/logs" >&2
        exit 1
    fi
    echo "$newest $count" >"$run/.restarts"
}

requeue() { # CODE; does not return
    [ "$1" -ne "$BAD_INPUT" ] || exit "$1"
    local job=$SLURM_JOB_ID state
    # The first task of an array has the array's own number, and requeueing that would requeue all of it.
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    state=$(scontrol --oneliner show job "$job" | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p')
    if [ "$state" != RUNNING ]; then
        echo "ended with code $1; not requeued, because the job is $state"
        exit "$1"
    fi
    echo "ended with code $1; requeueing job $job"
    scontrol requeue "$job" || fail "job $job cannot be requeued; the same command continues the run"
    exit 0
}

# ---- on every node, under srun

node() { # SCRIPT [OPTION…]
    local processes=${PROCESSES:-$SLURM_GPUS_ON_NODE} seen code=0 codes container
    # SLURM signals all processes of a step at once. The ranks must answer, each by finishing its step; torchrun would
    # kill them, so it and the shells ignore the signals, and the ranks do until they are ready to answer.
    trap '' USR1 TERM
    read -ra container <<<"${CONTAINER:-}"
    if [ -z "${PROCESSES:-}" ]; then
        seen=$("${container[@]}" python -c 'import torch; print(torch.cuda.device_count())' 2>&1 | tail -n 1) || true
        [[ $seen =~ ^[0-9]+$ && $seen -ge $processes ]] ||
            fail "SLURM gave $processes GPUs on $SLURMD_NODENAME, torch sees: $seen (PROCESSES=N runs on the CPU)"
    fi
    export PET_SIGNALS_TO_HANDLE=SIGQUIT OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    "${container[@]}" python -m torch.distributed.run --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" \
        --nproc-per-node="$processes" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
        --no-python bash slurm/launch.sh rank "$@" 2>"$LOGS/node-$SLURM_NODEID.log" || code=$?
    # torchrun answers every failure with 1, so the ranks' own codes are read from their files.
    codes=" $(cat "$LOGS/exit-$SLURM_NODEID-"* 2>/dev/null | sort -un | tr '\n' ' ')"
    case $codes in
        *" $BAD_INPUT "*) exit "$BAD_INPUT" ;;
        *" $STOPPED "*) exit "$STOPPED" ;;
    esac
    [ "$code" -eq 0 ] || echo "error: torchrun ended with $code on $SLURMD_NODENAME, the ranks with:${codes% }; see $LOGS" >&2
    exit "$code"
}

# ---- one a process, under torchrun

rank() { # SCRIPT [OPTION…]
    local log=$LOGS/rank-$RANK.log code=0
    if [ "$RANK" = 0 ]; then
        python "$@" 2>&1 | tee "$log" || code=${PIPESTATUS[0]}
    else
        python "$@" >"$log" 2>&1 || code=$?
    fi
    echo "$code" >"$LOGS/exit-$SLURM_NODEID-$LOCAL_RANK"
    # To torchrun a stopped rank is a success: on a failure it would kill the ranks that are still saving.
    [ "$code" -ne "$STOPPED" ] || code=0
    exit "$code"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    case ${1:-} in
        node | rank) "$@" ;;
        *) fail "this is what the launchers beside it share; call one of those" ;;
    esac
else
    launcher=slurm/$(basename "$0") arguments=("$@") asked=''
    # From the first line on: a signal that finds no trap would end the job without a requeue.
    [ -z "${SLURM_JOB_ID:-}" ] || trap 'asked=yes' USR1 TERM
    read_site
fi
