#!/usr/bin/env bash
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
# Train on a Slurm cluster: one or several nodes, through as many jobs as it takes.
#
#     bash run_slurm.sh --FLAG=VALUE ...                   checks train.py's flags, then submits this script
#     NODES=2 TIME=12:00:00 bash run_slurm.sh ...          settings are environment variables, listed below
#     ARRAY=lines.txt bash run_slurm.sh ...                a job array: each line of the file holds one task's further flags
#     sbatch --nodes=2 --gres=gpu:8 ... run_slurm.sh ...   with your own options, from the project's root (or RUN_SLURM_ROOT)
#
# Before the time limit the run saves its state and ends, and the job goes back into the queue and resumes. `scancel` ends it
# for good; a file `stop` in the run's folder saves the state and requeues. Inside an allocation of salloc it starts there.
#
# What a job requests; no default means that the option is omitted:
#     NODES=1  GPUS=8 (a node; 0: one process a node, on its CPUs)  CPUS=8 a GPU (the number is for a node)  MEM (a node)
#     TIME=24:00:00  PARTITION  ACCOUNT  QOS  CONSTRAINT  JOB_NAME=train
#     SBATCH_ARGS         further options of sbatch, with a shell's quotes; they win over the others
#     LOG_DIR=runs/slurm  where the jobs' output goes
#     CHECK=1             0: submits although `train.py --check` cannot see the data from here
#     ARRAY, MAX_PARALLEL the file of a job array (blank lines and lines that begin with # do not count; quotes as in a shell,
#                         nothing is expanded), and how many of its tasks may run at once
# What happens inside the job:
#     SETUP               a shell line that runs first, in the job's shell and then on each node: module load ...
#     PYTHON              the Python to use (see setup_env.sh)
#     PORT                of the rendezvous on the first node; by default 20000 to 29999, by the job's number
#     IFACE               the network interface, such as ib0, for rendezvous, NCCL and gloo; by default they choose
#     STOP_SECONDS=300    time between the request to stop and the time limit (Slurm may send it a minute early); torchrun
#                         waits equally long for its processes after SIGTERM
#     MAX_RESTARTS=3      starts within one job after crashes, each only if the last one got further
#     MAX_REQUEUES=100    how often the job has been restarted, by this script or Slurm, when it is no more requeued
#     RUN_SLURM_ROOT      the project's root, where sbatch was not called from there
#
# Relative paths start where you call it. Exit status: 0 finished, or requeued; 2 a flag or setting is wrong; 3 training
# diverged; 75 stopped, but not to be requeued; 1 anything else.
set -euo pipefail

say() { printf 'run_slurm.sh: %s\n' "$*" >&2; }

refuse() {
    say "$*"
    exit 2
}

# sbatch runs a copy of this script, so that where it lies says nothing.
project_root() {
    local here
    here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd) || true
    for root in "${RUN_SLURM_ROOT:-}" "$here" "${SLURM_SUBMIT_DIR:-}"; do
        if [ -n "$root" ] && [ -e "$root/train.py" ] && [ -e "$root/setup_env.sh" ]; then
            return
        fi
    done
    refuse "the project was not found: call sbatch from the project's root, or say where that is with RUN_SLURM_ROOT."
}

# A shell inside a job's step, such as srun --pty bash, submits like one on a login node. The batch shell may carry the step of
# the shell that submitted it.
in_job() {
    [ -n "${SLURM_JOB_ID:-}" ] && { [ -z "${SLURM_STEP_ID:-}" ] || [ "${SLURM_TASK_PID:-}" = $$ ]; }
}

whole_number() { # name, value, least, largest
    if ! [[ $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || [ "$2" -lt "$3" ] || [ "$2" -gt "${4:-999999999}" ]; then
        local range="from $3 on"
        if [ -n "${4:-}" ]; then range="from $3 to $4"; fi
        refuse "$1: expected a whole number $range, got '$2'."
    fi
}

# A time as Slurm writes it, in seconds: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.
seconds() {
    local days=0 first second third
    [[ $1 =~ ^([0-9]{1,4}-)?[0-9]{1,6}(:[0-9]{1,2}){0,2}$ ]] || return 1
    IFS=: read -r first second third <<<"${1#*-}"
    if [[ $1 == *-* ]]; then
        days=${1%%-*}
    elif [ -z "$third" ]; then
        third=$second second=$first first=0
    fi
    echo $((((10#$days * 24 + 10#$first) * 60 + 10#${second:-0}) * 60 + 10#${third:-0}))
}

# Splits $1 into the array `words` by a shell's rules for quotes, and expands nothing; fails where a quote is left open.
split() {
    local text word
    words=()
    text=$("$PY" -c 'import shlex, sys; print(*("=" + word for word in shlex.split(sys.argv[1])), sep="\n")' "$1" 2>/dev/null) ||
        return 1
    while IFS= read -r word; do
        if [ -n "$word" ]; then
            words+=("${word#=}")
        fi
    done <<<"$text"
}

# The array `lines`: what counts in the file ARRAY.
read_lines() {
    local line
    lines=()
    if [ ! -f "$ARRAY" ] || [ ! -r "$ARRAY" ]; then
        refuse "ARRAY: expected a file with one task's flags a line, got '$ARRAY', which cannot be read."
    fi
    while IFS= read -r line || [ -n "$line" ]; do
        line=${line%$'\r'}
        if ! [[ $line =~ ^[[:space:]]*(#|$) ]]; then
            lines+=("$line")
        fi
    done <"$ARRAY"
    if [ ${#lines[@]} -eq 0 ]; then
        refuse "ARRAY: expected a file with one task's flags a line, '$ARRAY' has none."
    fi
}

split_line() { # its index among those that count
    split "${lines[$1]}" || refuse "ARRAY: expected flags with closed quotes, '$ARRAY' has this line: ${lines[$1]}"
}

# With training.resume=none each start of a job would train from scratch. With another run's state, a restart resumes from its own.
check_resume() {
    local value=auto
    while [ $# -gt 0 ]; do
        case $1 in
            --training.resume=*) value=${1#*=} ;;
            --training.resume) value=${2:-} ;;
        esac
        shift
    done
    if [ "$value" = none ] && [ "$MAX_RESTARTS,$MAX_REQUEUES" != 0,0 ]; then
        refuse "--training.resume=none would train from scratch after every requeue: omit it, or set MAX_RESTARTS=0 MAX_REQUEUES=0."
    fi
}

# --- On the login node -----------------------------------------------------------------------------------------------------

# Settings and their defaults; `processes` is what a node will run.
read_settings() {
    NODES=${NODES:-1}
    export GPUS=${GPUS:-8}
    whole_number NODES "$NODES" 1
    whole_number GPUS "$GPUS" 0
    processes=$((GPUS > 0 ? GPUS : 1))
    CPUS=${CPUS:-$((8 * processes))}
    whole_number CPUS "$CPUS" 1
    if [ -n "${MAX_PARALLEL:-}" ]; then
        whole_number MAX_PARALLEL "$MAX_PARALLEL" 1
    fi
    TIME=${TIME:-24:00:00}
    local limit
    if ! limit=$(seconds "$TIME"); then
        refuse "TIME: expected minutes, or as Slurm writes it, such as 12:00:00 or 2-12:00:00, got '$TIME'."
    fi
    # Slurm would ask for the stop at once.
    if [ "$limit" -le $((2 * STOP_SECONDS)) ]; then
        refuse "TIME: expected more than twice STOP_SECONDS=$STOP_SECONDS, got '$TIME'."
    fi
}

# Parsing the flags is fast and done for all tasks. The check that reads the data, too, is done for the first task only.
check_flags() {
    local index folder
    local -a task checked
    local -A line_of
    for index in "${!lines[@]}"; do
        split_line "$index"
        task=("$@" ${words[@]+"${words[@]}"})
        check_resume "${task[@]}"
        if ! folder=$(RANK=0 WORLD_SIZE=$((NODES * processes)) "$PY" "$root/train.py" --where "${task[@]}"); then
            refuse "these flags are wrong, see above: ${task[*]}"
        fi
        if [ -n "${line_of[$folder]:-}" ]; then
            refuse "ARRAY: expected lines that lead to different runs, '$ARRAY' has two for $folder: ${line_of[$folder]} and" \
                "${lines[$index]}"
        fi
        line_of[$folder]=${lines[$index]:-no line}
        if [ "$index" = 0 ]; then
            checked=("${task[@]}")
        fi
    done
    if [ "${CHECK:-1}" != 0 ]; then
        # The login node may have fewer GPUs than a node of the job, or others.
        CUDA_VISIBLE_DEVICES='' RANK=0 WORLD_SIZE=$((NODES * processes)) LOCAL_WORLD_SIZE=$processes \
            "$PY" "$root/train.py" --check "${checked[@]}"
    fi
}

submit() {
    read_settings
    lines=('')
    if [ -n "${ARRAY:-}" ]; then
        read_lines
    fi
    if ! command -v sbatch >/dev/null; then
        refuse "there is no sbatch here: submit from a login node of a Slurm cluster, or use run_train.sh."
    fi
    PY=$(bash "$root/setup_env.sh")
    check_flags "$@"

    LOG_DIR=${LOG_DIR:-runs/slurm}
    mkdir -p "$LOG_DIR"
    LOG_DIR=$(CDPATH='' cd -- "$LOG_DIR" && pwd)
    local name=%x-%j.out
    local -a options=(
        --job-name="${JOB_NAME:-train}" --nodes="$NODES" --ntasks-per-node=1 --cpus-per-task="$CPUS" --time="$TIME"
        --requeue --open-mode=append --signal="B:USR1@$STOP_SECONDS" --chdir="$PWD" --export=ALL
    )
    # Unlike --gpus-per-node, it is known to old versions and all ways of configuring Slurm.
    if [ "$GPUS" -gt 0 ]; then options+=(--gres="gpu:$GPUS"); fi
    if [ -n "${MEM:-}" ]; then options+=(--mem="$MEM"); fi
    if [ -n "${PARTITION:-}" ]; then options+=(--partition="$PARTITION"); fi
    if [ -n "${ACCOUNT:-}" ]; then options+=(--account="$ACCOUNT"); fi
    if [ -n "${QOS:-}" ]; then options+=(--qos="$QOS"); fi
    if [ -n "${CONSTRAINT:-}" ]; then options+=(--constraint="$CONSTRAINT"); fi
    if [ -n "${ARRAY:-}" ]; then
        options+=(--array="0-$((${#lines[@]} - 1))${MAX_PARALLEL:+%$MAX_PARALLEL}")
        name=%x-%A_%a.out
        # A copy: the file may be edited before the last task starts, or resumes.
        ARRAY=$(mktemp "$LOG_DIR/array-XXXXXX")
        printf '%s\n' "${lines[@]}" >"$ARRAY"
        export ARRAY
    fi
    options+=(--output="${LOG_DIR//%/%%}/$name")
    split "${SBATCH_ARGS:-}" || refuse "SBATCH_ARGS: expected options with closed quotes, got: $SBATCH_ARGS"

    # What a job around this shell was given must not reach the new one, whose srun would take it for its own.
    local variable
    for variable in ${!SLURM_@}; do
        if [ "$variable" != SLURM_CONF ]; then unset "$variable"; fi
    done
    export RUN_SLURM_ROOT=$root PYTHON=$PY
    exec sbatch "${options[@]}" ${words[@]+"${words[@]}"} "$root/run_slurm.sh" "$@"
}

# --- Inside the job --------------------------------------------------------------------------------------------------------

# How the run stands, by its status.json: `state`, `step`, `reason`, and the whole `record`.
read_status() {
    local text
    # The first process may be on another node: listing the folder makes a network disk look again.
    ls "$folder" >/dev/null 2>&1 || true
    record=$(cat "$folder/status.json" 2>/dev/null || true)
    text=$("$PY" -c '
import json, sys
try:
    record = json.loads(sys.argv[1])
    state, step, reason = str(record["status"]), int(record["step"]), str(record.get("reason", ""))
except (ValueError, KeyError, TypeError, AttributeError):
    state, step, reason = "missing", 0, ""
print(state, step, " ".join(reason.split()))
' "$record")
    read -r state step reason <<<"$text"
}

# A signal would not do: Slurm can send this one to all steps, but torchrun knows no SIGUSR1 and would die of it.
ask_for_stop() {
    asked=$1
    say "$1 from Slurm: the run is asked to stop."
    if [ -n "$folder" ]; then
        { mkdir -p "$folder" && : >"$folder/stop"; } || say "$folder/stop could not be written."
    fi
}

requeue() { # exit status where that cannot be
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_REQUEUES" ]; then
        say "job $job was restarted ${SLURM_RESTART_COUNT:-0} times (MAX_REQUEUES=$MAX_REQUEUES) and is not requeued; the same" \
            "command resumes from step $step."
        exit "$1"
    fi
    trap '' TERM USR1 # Slurm ends what it requeues
    say "job $job goes back into the queue."
    # Incomplete: one that the user has cancelled stays cancelled.
    if scontrol requeue Incomplete "$job"; then
        exit 0
    fi
    say "job $job could not be requeued; the same command resumes from step $step."
    exit "$1"
}

# The address of this node on the interface $1.
address_on() { ip -o -4 addr show dev "$1" | awk '{ sub("/.*", "", $4); print $4; exit }'; }

# What runs on each node. srun starts it in a new shell, which has no other function than this and the one above.
on_node() { # Python, train.py, number of nodes, processes a node, first node, its address, port, the rendezvous's name, flags
    local python=$1 program=$2 nodes=$3 processes=$4 first=$5 endpoint=$6:$7 id=$8 own=${SLURMD_NODENAME:-localhost} is_host=false
    shift 8
    if [ -n "${SETUP:-}" ]; then
        eval "$SETUP" || exit
    fi
    # By itself torchrun compares names and addresses to find out whether it is on the first node, and may be wrong.
    if [ "$nodes" = 1 ] || [ "$own" = "$first" ]; then is_host=true; fi
    # By itself it gives out its fully qualified name, which not every node's resolver knows.
    if [ "$nodes" = 1 ]; then own=localhost; elif [ -n "${IFACE:-}" ]; then own=$(address_on "$IFACE"); fi
    # No restarts by torchrun: it would also restart a run that has stopped on request or diverged.
    exec "$python" -m torch.distributed.run --nnodes="$nodes" --nproc_per_node="$processes" --max-restarts=0 \
        --rdzv_backend=c10d --rdzv_endpoint="$endpoint" --rdzv_id="$id" --local_addr="$own" \
        --rdzv_conf="is_host=$is_host,join_timeout=900,read_timeout=300" "$program" "$@"
}

# Starts training on all nodes and waits for its end; `ended` is srun's exit status.
launch() { # the rendezvous's name, flags
    local id=$1 pid
    shift
    # An agent that fails must not take the others with it at once (--kill-on-bad-exit): on its way down a run may be saving.
    # They may not wait forever either if it died silently. They have two minutes.
    local -a options=(--kill-on-bad-exit=0 --wait=120 --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1)
    # A task gets all CPUs of the job on its node. Newer versions of srun ignore sbatch's --cpus-per-task.
    options+=(--export=ALL --cpu-bind=none)
    if [ "${SLURM_NTASKS_PER_NODE:-}" = 1 ] && [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
        options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
    fi
    srun "${options[@]}" bash -c "$(declare -f address_on on_node); on_node \"\$@\"" on_node \
        "$PY" "$root/train.py" "$nodes" "$processes" "$first" "$address" "$PORT" "$id" "$@" &
    pid=$!
    # A signal ends `wait`, but not srun.
    while kill -0 "$pid" 2>/dev/null; do
        wait "$pid" || true
    done
    ended=0
    wait "$pid" || ended=$?
}

time_remains() {
    [ -z "${SLURM_JOB_END_TIME:-}" ] || [ $((SLURM_JOB_END_TIME - $(date +%s))) -gt $((2 * STOP_SECONDS)) ]
}

# Where the processes meet: `first`, `address`, `PORT`, and how many there are.
find_rendezvous() {
    nodes=$SLURM_NNODES
    if ! first=$(scontrol show hostnames "$SLURM_JOB_NODELIST"); then
        say "scontrol could not list the names of the job's nodes, $SLURM_JOB_NODELIST."
        exit 1
    fi
    first=${first%%$'\n'*}
    PORT=${PORT:-$((20000 + SLURM_JOB_ID % 10000))}
    whole_number PORT "$PORT" 1024 65535
    processes=${GPUS:-${SLURM_GPUS_ON_NODE:-gpu}}
    if [ "$processes" = 0 ]; then processes=1; fi
    # torchrun counts the GPUs of "gpu" itself.
    on_node=$processes
    if [ "$processes" = gpu ]; then
        on_node=$(nvidia-smi -L 2>/dev/null | grep -c ^GPU) || on_node=1
    fi
    address=$first
    if [ "$nodes" = 1 ]; then
        address=localhost
    elif [ -n "${IFACE:-}" ]; then
        address=$(address_on "$IFACE") || true
        if [ -z "$address" ]; then
            refuse "IFACE: expected a network interface with an IPv4 address, got '$IFACE'."
        fi
        export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$IFACE}" GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$IFACE}"
    fi
}

set_up() {
    local status=0
    if [ -n "${SETUP:-}" ]; then
        set +eu # the user's line, and what it loads, need not be strict
        eval "$SETUP"
        status=$?
        set -eu
    fi
    if [ "$status" != 0 ]; then
        say "SETUP ended with status $status: $SETUP"
        exit 1
    fi
    # OpenMP's threads spin while they wait, which slows two busy programs on one machine down tenfold; spin only briefly.
    export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"
    # timm 1.0.9 uses what newer versions of PyTorch call deprecated: nothing a user can act on.
    export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning:torch.jit._script}"
    # torchrun kills what it has sent SIGTERM after 30 seconds, also while it saves. PyTorch 2.6 does not know this variable.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-$STOP_SECONDS}"
    PY=$(bash "$root/setup_env.sh")
}

# Ends the job if the last start recorded how it ended; returns if it recorded nothing.
obey_status() { # the record before it
    if [ "$state" = finished ] && { [ "$record" != "$1" ] || [ "$ended" = 0 ]; }; then
        say "finished."
        exit 0
    fi
    # A record of an earlier start says nothing about this one.
    if [ "$record" = "$1" ]; then
        return
    fi
    case $state in
        stopped)
            say "stopped at step $step: $reason"
            requeue 75
            ;;
        diverged)
            say "diverged: $reason"
            exit 3
            ;;
        failed)
            say "failed: $reason"
            exit 1
            ;;
    esac
}

work() {
    asked='' folder=''
    trap 'ask_for_stop USR1' USR1
    trap 'ask_for_stop TERM' TERM
    job=$SLURM_JOB_ID
    set_up
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
        job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
        ARRAY=${ARRAY:-}
        read_lines
        if [ "$SLURM_ARRAY_TASK_ID" -ge ${#lines[@]} ]; then
            refuse "ARRAY: '$ARRAY' has ${#lines[@]} lines that count, none for task $SLURM_ARRAY_TASK_ID (the first is 0)."
        fi
        split_line "$SLURM_ARRAY_TASK_ID"
        set -- "$@" ${words[@]+"${words[@]}"}
    fi
    check_resume "$@"
    find_rendezvous
    folder=$(RANK=0 WORLD_SIZE=$((nodes * on_node)) "$PY" "$root/train.py" --where "$@")
    rm -f "$folder/stop" # left by an earlier start
    read_status
    say "job $job, restarted ${SLURM_RESTART_COUNT:-0} times, $nodes node(s) from $first on: $folder, from step $step"

    local begin=$step restarts=0 ended='' before last
    while [ -z "$asked" ]; do
        before=$record last=$step
        launch "${SLURM_JOB_ID}_${SLURM_RESTART_COUNT:-0}_$restarts" "$@"
        if [ -n "$asked" ]; then
            rm -f "$folder/stop"
        fi
        read_status
        obey_status "$before"
        say "training ended without a recorded reason (srun's status $ended) at step $step; it began at step $last. $reason"
        # Agents that lost one another, or a process that was killed: start all of them again in this job. Where that gets no
        # further, other nodes might.
        if [ -n "$asked" ] || [ "$step" -le "$last" ] || [ "$restarts" -ge "$MAX_RESTARTS" ] || ! time_remains; then
            break
        fi
        restarts=$((restarts + 1))
    done
    if [ "$step" -gt "$begin" ] || [ -z "$ended" ]; then
        requeue 1
    fi
    say "this job got no further than step $begin, so it is not requeued."
    exit 1
}

project_root
if [ $# -eq 0 ]; then
    refuse "expected train.py's flags, got none; bash run_slurm.sh --help lists them."
fi
for argument in "$@"; do
    if [ "$argument" = --help ] || [ "$argument" = -h ]; then
        PY=$(bash "$root/setup_env.sh")
        exec "$PY" "$root/train.py" "$@"
    fi
done
STOP_SECONDS=${STOP_SECONDS:-300}
MAX_RESTARTS=${MAX_RESTARTS:-3}
MAX_REQUEUES=${MAX_REQUEUES:-100}
whole_number STOP_SECONDS "$STOP_SECONDS" 1 65535
whole_number MAX_RESTARTS "$MAX_RESTARTS" 0
whole_number MAX_REQUEUES "$MAX_REQUEUES" 0
if in_job; then
    work "$@"
else
    submit "$@"
fi
