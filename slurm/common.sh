# shellcheck shell=bash
# What the batch scripts of this folder share; they source it, and users read docs/cluster.md.
set -euo pipefail

readonly FIRST_PORT=20000 NUM_PORTS=12000 # below the ports that Linux gives to outgoing connections
readonly PORT_STEP=1009 # from one start of a job to the next, which may find the first one's port taken
readonly CPUS_PER_PROCESS=2 # at least, beside a GPU: one that keeps it busy, one that makes batches
readonly INTERRUPTED_STATUS=75                # of a program that was asked to stop and has saved
readonly NOT_AR='vae|denoiser|rollout|rl|ar-rl|verifier' # phases that the baseline may be trained beside

fail() {
    echo "error: $*" >&2
    exit 2
}

# run_phase ENTRY NEEDS CONFIG [section.key=value ...]: run training/ENTRY.py on all nodes of this job.
# NEEDS is "gpus" (one process per GPU) or "cpu" (one process in all).
run_phase() {
    local needs=$2
    entry=$1 lane=''
    shift 2
    [ $# -gt 0 ] || fail "$entry: no configuration; submit: sbatch slurm/$entry.sbatch configs/NAME.yaml [section.key=value ...]"
    local config=$1
    shift
    [ -f "$config" ] || fail "$entry: no configuration file '$config' in $PWD"
    if [[ " $* " =~ \ evaluate\.lane=(ar|ladir)\  ]]; then lane=${BASH_REMATCH[1]}; fi
    use_environment
    read_settings "$config" "$@"
    count_processes "$entry" "$needs"
    prepare_run_folder
    echo "$(date '+%F %T') $SLURM_JOB_NAME, job $SLURM_JOB_ID, start $((restarts + 1)): $NODES node(s) x $PROCESSES process(es), $LAUNCHER"
    [ "$idle_restarts" -le "$max_restarts" ] ||
        fail "$entry: $idle_restarts restarts without progress, MAX_RESTARTS=$max_restarts; find out why in $LOG, then submit it again: it continues"
    export_environment
    local status=0
    trap : TERM USR1 USR2 "$STOP_SIGNAL" # the step's processes answer signals; this shell only waits for them
    start_step "$entry" --config "$config" "$@" || status=$?
    finish "$entry" "$status"
}

# run_snapshots CONFIG [section.key=value ...]: ask the snapshots that wait, one after another, each in a step of its own.
# Where none waits and the training TRAINING_JOB goes on, the job returns to the queue for SNAPSHOT_SECONDS and holds no GPU.
run_snapshots() {
    entry=evaluate_snapshots
    [ $# -gt 0 ] || fail "$entry: no configuration; submit: sbatch slurm/$entry.sbatch configs/NAME.yaml [section.key=value ...]"
    local config=$1 goes_on snapshot asked=0 given_port=${MASTER_PORT:-}
    shift
    [ -f "$config" ] || fail "$entry: no configuration file '$config' in $PWD"
    use_environment
    read_settings "$config" "$@"
    count_processes "$entry" gpus
    prepare_run_folder
    keep_others_out
    export_environment
    trap : TERM USR1 USR2 "$STOP_SIGNAL"
    while true; do
        goes_on=no
        ! is_under_way "${TRAINING_JOB:-}" || goes_on=yes # before the look: behind its end a training leaves no snapshot
        snapshot=$(next_snapshots "$config" "$@") || exit 2
        [ -n "$snapshot" ] || break
        if [ "$asked" -gt 0 ]; then
            ! is_short_of_time || finish "$entry" "$INTERRUPTED_STATUS" # a stop signal between two steps has reached nobody
            # The port of the step before may not be free yet.
            [ -n "$given_port" ] || MASTER_PORT=$((FIRST_PORT + (MASTER_PORT - FIRST_PORT + PORT_STEP) % NUM_PORTS))
        fi
        asked=$((asked + 1))
        ask_snapshot "$snapshot" "$config" "$@"
    done
    [ "$goes_on" = no ] || wait_for_snapshots
    snapshot=$(next_snapshots --given-up "$config" "$@") || exit 2
    [ -z "$snapshot" ] || fail "$entry: given up after two failures each: ${snapshot//$'\n'/, }; why, and what to remove to try again: $FAILED_SNAPSHOTS"
    echo "$(date '+%F %T') $entry: all are asked, and no training goes on"
}

next_snapshots() {
    where_python_is python slurm/snapshots.py "$@"
}

# One job at a time looks for the snapshots of a phase, and none beside one that looks for those of all, so that none is asked
# twice.  It lets go when this script ends.
keep_others_out() {
    FAILED_SNAPSHOTS=$RUN_FOLDER/slurm/failed-snapshots
    local locks=$RUN_FOLDER/slurm/.snapshots share=--exclusive status=0
    [ -z "${SNAPSHOTS_OF:-}" ] || share=--shared
    exec 8<>"$locks.lock" 9<>"$locks-${SNAPSHOTS_OF:-all}.lock"
    { flock "$share" --wait 60 8 && flock --wait 60 9; } || status=$?
    if [ "$status" -eq 1 ]; then # anything else: the file system knows no locks
        echo "$entry: another job asks these snapshots"
        ! is_under_way "${TRAINING_JOB:-}" || wait_for_snapshots # the other one may not wait for those to come
        exit 0
    fi
}

# ask_snapshot 'PHASE STEP SETTING ...' CONFIG [section.key=value ...]: returns when it is asked, or fails by itself.
ask_snapshot() {
    local words status=0
    read -r -a words <<<"$1"
    echo "$(date '+%F %T') $SLURM_JOB_NAME, job $SLURM_JOB_ID, start $((restarts + 1)): step ${words[1]} of ${words[0]}," \
        "$NODES node(s) x $PROCESSES process(es), $LAUNCHER"
    start_step evaluate --config "${@:2}" "${words[@]:2}" 8>&- 9>&- || status=$?
    [ "$status" -ne 0 ] || [ -e "$INTERRUPTED_MARK" ] || return 0
    read_blame
    if [ -e "$INTERRUPTED_MARK" ] || [ "$status" -eq "$INTERRUPTED_STATUS" ] || ! [[ $kind =~ ^(refused|fault)$ ]]; then
        finish "$entry" "$status"
    fi
    # The others are asked all the same, and this one once more.
    echo "error: step ${words[1]} of ${words[0]} was not asked: ${meaning[$kind]}; see above, and by rank $RANK_LOGS" >&2
    echo "${words[0]} ${words[1]} job $SLURM_JOB_ID $(date '+%F %T') ${meaning[$kind]}" >>"$FAILED_SNAPSHOTS"
    rm -f "$FAILURE_MARK"
}

# Whether a job waits, runs or is on its way back to the queue; where Slurm does not answer it is taken to be.
is_under_way() {
    [ -n "$1" ] || return 1
    local answer
    if ! answer=$(scontrol show job -o "$1" 2>&1); then
        [[ $answer != *"Invalid job id"* ]]
        return
    fi
    ! [[ $answer =~ \ JobState=(COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL|OUT_OF_MEMORY|BOOT_FAIL|DEADLINE)\  ]]
}

# Whether the time in which a step can be told to stop is over.
is_short_of_time() {
    local end
    end=$(ask_slurm show job -o "$SLURM_JOB_ID" | sed -n 's/.* EndTime=\([0-9][^ ]*\).*/\1/p')
    [ -n "$end" ] && [ $(($(date -d "$end" +%s) - $(date +%s))) -le "${STOP_SECONDS:-300}" ]
}

# Back to the queue, which is no restart without progress.
wait_for_snapshots() {
    local seconds=${SNAPSHOT_SECONDS:-600}
    end_if_cancelled "job $TRAINING_JOB goes on"
    echo "$(date '+%F %T') $entry: job $TRAINING_JOB goes on; the next look is in $seconds seconds"
    echo '0 waits' >"$RUN_FOLDER/slurm/restarts-$SLURM_JOB_ID"
    rm -f "$STARTED" # no node was lost
    trap '' TERM "$STOP_SIGNAL"
    ask_slurm requeue "$SLURM_JOB_ID" || fail "$entry: scontrol requeue was refused; submit it again for the snapshots to come"
    ask_slurm update "JobId=$SLURM_JOB_ID" "StartTime=now+$seconds" || true # it then looks sooner
    exit 0
}

# The Python of the cluster's user: in CONTAINER, VENV, .venv of this project, or whatever is on the path.
use_environment() {
    local venv=${VENV:-.venv}
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
    read -r -a container <<<"${CONTAINER:-}"
    read -r -a srun_extra <<<"${SRUN_EXTRA:-}"
    ! slurm_has_image || container=() # CONTAINER is then for submit.sh alone
    ! has_image || return 0
    if [ -f "$venv/bin/activate" ]; then
        # shellcheck disable=SC1091
        source "$venv/bin/activate"
    elif [ -n "${VENV:-}" ]; then
        fail "VENV=$VENV is no virtual environment (no bin/activate in it)"
    fi
    command -v python >/dev/null || fail "no python: make the environment with 'make venv', or name yours in VENV"
}

# Whether Python is in an image: of CONTAINER, or of Slurm's own containers (--container-image=... in SRUN_EXTRA).
has_image() {
    [ ${#container[@]} -gt 0 ] || slurm_has_image
}

slurm_has_image() {
    [[ " ${SRUN_EXTRA:-}" == *" --container-"* ]]
}

# Runs a command of this job's first node where Python is.
where_python_is() {
    if [ ${#container[@]} -gt 0 ]; then
        "${container[@]}" "$@"
    elif has_image; then
        srun --nodes=1 --ntasks=1 "${srun_extra[@]}" "$@"
    else
        "$@"
    fi
}

# Checks the configuration without loading anything heavy; sets RUN_FOLDER and STOP_SIGNAL.
read_settings() {
    local answer
    answer=$(where_python_is python slurm/settings.py "$@") || exit 2
    { read -r RUN_FOLDER && read -r STOP_SIGNAL; } <<<"$answer"
    export RUN_FOLDER STOP_SIGNAL
}

count_processes() {
    local entry=$1 needs=$2
    NODES=$SLURM_JOB_NUM_NODES
    if [ "$needs" = cpu ]; then
        NODES=1 PROCESSES=1
    else
        PROCESSES=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
    fi
    [[ $PROCESSES =~ ^[1-9][0-9]*$ ]] ||
        fail "$entry: this job has no GPU; submit with --gres=gpu:N --cpus-per-task=M (or PROCESSES_PER_NODE=N," \
            "for a run without GPUs)"
    [ "$needs" = cpu ] || check_cpus "$entry"
    LAUNCHER=${LAUNCHER:-torchrun}
    [[ $LAUNCHER =~ ^(torchrun|deepspeed|srun)$ ]] || fail "LAUNCHER=$LAUNCHER: must be torchrun, deepspeed or srun"
    export NODES PROCESSES LAUNCHER
}

# Without GPUs (PROCESSES_PER_NODE) processes may share a CPU; beside a GPU they would keep it waiting.
check_cpus() {
    local least=$((CPUS_PER_PROCESS * PROCESSES)) cpus=${SLURM_CPUS_ON_NODE:-}
    [[ ${SLURM_GPUS_ON_NODE:-} =~ ^[1-9] && -n $cpus ]] || return 0
    [ "$cpus" -ge "$least" ] ||
        fail "$1: $cpus CPU(s) on a node for $PROCESSES process(es), each needs $CPUS_PER_PROCESS beside a GPU;" \
            "add --cpus-per-task=N, the CPUs of a whole node, $least at least"
}

# One appended log per job, the submitted script and the hostfile, all in the run folder.
prepare_run_folder() {
    max_restarts=${MAX_RESTARTS:-20}
    max_crashes=${MAX_CRASHES:-3}
    RANK_LOGS=$RUN_FOLDER/logs/ranks
    LOG=$RUN_FOLDER/logs/$SLURM_JOB_NAME-$SLURM_JOB_ID.log
    HOSTFILE=$RUN_FOLDER/slurm/hostfile-$SLURM_JOB_ID
    mkdir -p "$RANK_LOGS" "$RUN_FOLDER/slurm" || fail "$RUN_FOLDER cannot be written; choose another run.folder"
    if ! [ /dev/stdout -ef "$LOG" ]; then
        echo "log: $LOG"
        exec >>"$LOG" 2>&1
    fi
    cp "$0" "$RUN_FOLDER/slurm/$SLURM_JOB_NAME-$SLURM_JOB_ID.sbatch"
    scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n "1,${NODES}s/\$/ slots=$PROCESSES/p" >"$HOSTFILE"
    # Of this job alone: another one that starts in this run removes INTERRUPTED, and must not take this one for finished.
    INTERRUPTED_MARK=$RUN_FOLDER/slurm/interrupted-$SLURM_JOB_ID
    # Written by the first process that knows why the job fails: the kind of failure, and the nodes that are to blame.
    FAILURE_MARK=$RUN_FOLDER/slurm/failure-$SLURM_JOB_ID
    rm -f "$INTERRUPTED_MARK" "$FAILURE_MARK"
    FAILED_NODES=$RUN_FOLDER/slurm/failed-nodes
    count_restarts
    note_lost_node
    export RANK_LOGS HOSTFILE LOG INTERRUPTED_MARK FAILURE_MARK
}

# Sets restarts, of this job, and idle_restarts: the last ones among them before which nothing more was saved.
count_restarts() {
    local file=$RUN_FOLDER/slurm/restarts-$SLURM_JOB_ID before=''
    restarts=${SLURM_RESTART_COUNT:-0} idle_restarts=0
    mark=$(saved_so_far)
    if [ "$restarts" -gt 0 ] && [ -f "$file" ]; then
        read -r idle_restarts before <"$file"
        if [ "$mark" = "$before" ]; then idle_restarts=$((idle_restarts + 1)); else idle_restarts=0; fi
    fi
    echo "$idle_restarts $mark" >"$file"
}

# Where Slurm itself put the job back, since it lost a node, the script of that start could note nothing: this one does.
note_lost_node() {
    STARTED=$RUN_FOLDER/slurm/started-$SLURM_JOB_ID # is there until a start has come to its own end
    local number list begun node=''
    if [ "$restarts" -gt 0 ] && [ -f "$STARTED" ] && read -r number list begun <"$STARTED" && [ "$number" -lt "$restarts" ]; then
        node=$(lost_node "$list" "$begun")
    fi
    if [ -n "$node" ]; then
        echo "$node node-lost job $SLURM_JOB_ID $(date '+%F %T')" >>"$FAILED_NODES"
        echo "Slurm put this job back after it lost $node (noted in $FAILED_NODES)"
        find_bad_nodes
        [ -z "$bad_nodes" ] || those_that_wait_leave_it_out
    fi
    echo "$restarts $SLURM_JOB_NODELIST $(date '+%FT%T')" >"$STARTED"
}

# lost_node LIST TIME: the node of LIST that Slurm has lost since TIME: by its accounts where it keeps them, else the one that is
# down, does not respond or has booted since.  Nothing where there are several, or none: a job is also put back for others.
lost_node() {
    local nodes found
    nodes=$(scontrol show hostnames "$1")
    found=$(sacct --jobs="$SLURM_JOB_ID" --duplicates --allocations --noheader --parsable2 --format=State,FailedNode 2>/dev/null |
        tail -n 2 | awk -F'|' 'NR == 1 && $1 ~ /^NODE_FAIL/ { print $2 }' | grep -Fx "$nodes") || true
    [ -n "$found" ] || found=$(scontrol show node -o "$1" 2>/dev/null | awk -v since="$2" '
        { name = state = booted = "" }
        { for (i = 1; i <= NF; i++) { split($i, part, "="); value[part[1]] = part[2] } }
        { name = value["NodeName"]; state = value["State"]; booted = value["BootTime"] }
        state ~ /DOWN|NOT_RESPONDING|\*/ || (booted ~ /^[0-9]/ && booted > since) { print name }') || true
    [ "$(wc -w <<<"$found")" -ne 1 ] || echo "$found"
}

# Stands for what this job has saved: newest checkpoints, stores of tokens and questions, parts of latents, judged trajectories,
# answers (asked ones, and records' own that are accepted), finished phases.  What jobs beside it save is none of its progress.
saved_so_far() {
    {
        cd "$RUN_FOLDER"
        ls tokens/*/index.json
        wc -c gold.json
        case ${entry:-} in
            evaluate) wc -c evaluation/*/"${lane:-}"*/*.jsonl ;;
            evaluate_snapshots) # where the results are, the answers are gone
                ls results*-"${SNAPSHOTS_OF:-}"*.json suite*-"${SNAPSHOTS_OF:-}"*.json
                wc -c evaluation/*-"${SNAPSHOTS_OF:-}"*/*/*.jsonl
                ;;
            train_ar) saved_models | grep -Ev "^(checkpoints/($NOT_AR)/|outcome-($NOT_AR)(-[0-9]+)?\.json|latents/|judged/)" ;;
            *) saved_models | grep -Ev '^(checkpoints/ar/|outcome-ar(-[0-9]+)?\.json)' ;;
        esac
    } 2>/dev/null | { cksum | tr ' ' -; } || true
}

saved_models() {
    grep -H . checkpoints/*/latest
    ls latents/*.parts-*/*.json outcome-*.json
    find judged -name '*.safetensors' | sort # too many, perhaps, for a command line
}

export_environment() {
    MASTER_ADDR=$(sed -n '1s/ .*//p' "$HOSTFILE")
    MASTER_PORT=${MASTER_PORT:-$((FIRST_PORT + (SLURM_JOB_ID + PORT_STEP * restarts) % NUM_PORTS))}
    CORES=$((${SLURM_CPUS_ON_NODE:-$PROCESSES} / PROCESSES))
    export MASTER_ADDR MASTER_PORT
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES > 0 ? CORES : 1))}
    export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
    # A collective that waits too long ends the process, and the flight recorder says which one it was.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN} TORCH_NCCL_ASYNC_ERROR_HANDLING=1
    export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=1
    export TORCH_FR_DUMP_TEMP_FILE=$RANK_LOGS/nccl-$SLURM_JOB_ID-rank-
    if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
        export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # sbatch's --cpus-per-task does not reach srun by itself
    fi
}

start_step() {
    local options
    options=(--kill-on-bad-exit=1 --wait=120 --nodes="$NODES" --unbuffered)
    if [ "$LAUNCHER" = srun ]; then
        options+=(--ntasks="$((NODES * PROCESSES))" --ntasks-per-node="$PROCESSES")
        if [ "$CORES" -gt 0 ]; then
            options+=(--cpus-per-task="$CORES")
        else
            options+=(--overcommit --cpus-per-task=1)
        fi
    else
        options+=(--ntasks="$NODES" --ntasks-per-node=1)
    fi
    srun "${options[@]}" ${srun_extra[@]+"${srun_extra[@]}"} ${container[@]+"${container[@]}"} \
        bash slurm/node.sh "training/$1.py" "${@:2}"
}

# Interrupted runs go back to the queue, and those that crashed, where another start may end otherwise.
# The former end with status 75 and leave a mark, for launchers that garble statuses.
finish() {
    local entry=$1 status=$2 most=$max_restarts limit=MAX_RESTARTS what='interrupted and saved'
    if [ "$status" -ne "$INTERRUPTED_STATUS" ] && ! [ -e "$INTERRUPTED_MARK" ]; then
        [ "$status" -ne 0 ] || exit 0 # so it is for srun as well where Slurm has lost a node
        echo "error: $entry failed with status $status; its output is in $LOG, by rank in $RANK_LOGS" >&2
        find_blame
        may_come_back || exit "$status"
        what="crashed (${meaning[$kind]}${nodes:+: ${nodes//,/, }})"
        [ "$max_crashes" -gt "$most" ] || most=$max_crashes limit=MAX_CRASHES
    fi
    rm -f "$INTERRUPTED_MARK" "$FAILURE_MARK"
    end_if_cancelled "$what"
    rm -f "$STARTED"
    [ "$(saved_so_far)" != "$mark" ] || [ "$idle_restarts" -lt "$most" ] ||
        fail "$entry: ${what% and saved} before anything more was saved, and $limit=$most is used up; submit it again to continue"
    echo "$entry: $what; back to the queue (restart $((restarts + 1)); at most $most without progress)"
    find_bad_nodes
    trap '' TERM "$STOP_SIGNAL" # which end this script, and what it calls, as soon as the job is back in the queue
    ask_slurm requeue "$SLURM_JOB_ID" || fail "$entry: scontrol requeue was refused; submit it again to continue"
    leave_out_bad_nodes
    exit 0
}

# scontrol, asked again where it fails: its controller may be busy, or another one by now.
ask_slurm() {
    local try
    for try in 1 2 3; do
        ! scontrol "$@" || return 0
        [ "$try" -eq 3 ] || sleep 5
    done
    return 1
}

# A job that somebody has cancelled is not RUNNING any more and stays cancelled.  Where Slurm does not answer, it is not taken for
# cancelled: a job that is would not be put back either.
end_if_cancelled() {
    local answer
    if answer=$(ask_slurm show job -o "$SLURM_JOB_ID") && [[ $answer != *" JobState=RUNNING "* ]]; then
        echo "$entry: $1; this job was cancelled, submit it again to continue"
        exit 1
    fi
}

# Kinds of failures, as training/runtime/failures.py tells them apart.
declare -rA meaning=([refused]="an error to be mended" [fault]="an error in the program" [device]="a device or network fails"
    [lost]="a process was lost" [absent]="its processes did not find one another" [sick]="a device is wrong or slow" [ended]="processes died without a word")

# Sets kind and nodes.
read_blame() {
    kind=ended nodes=''
    [ ! -f "$FAILURE_MARK" ] || read -r kind nodes <"$FAILURE_MARK"
    nodes=${nodes#-}
}

# The same, and notes the nodes that are to blame.
find_blame() {
    read_blame
    local node
    for node in ${nodes//,/ }; do
        echo "$node $kind job $SLURM_JOB_ID $(date '+%F %T')" >>"$FAILED_NODES"
        rm -f "$STARTED" # what Slurm loses is not noted a second time
    done
}

# What the user must mend, and what the program does wrong by itself, would come again; behind new checkpoints it may be rare.
may_come_back() {
    case $kind in
        refused) return 1 ;;
        fault) [ "$(saved_so_far)" != "$mark" ] ;;
    esac
}

# Nodes that failed twice in this run do not get this job again, nor those of the chain that wait.  Slurm changes the list of
# a waiting job only, which this one is as soon as it is back in the queue, though its script has not ended.
find_bad_nodes() {
    bad_nodes=''
    [ ! -f "$FAILED_NODES" ] ||
        bad_nodes=$(awk '++seen[$1] == 2 { list = list sep $1; sep = "," } END { print list }' "$FAILED_NODES")
    left_out=$(left_out_by "$SLURM_JOB_ID")
}

leave_out_bad_nodes() {
    [ -n "$bad_nodes" ] || return 0
    leave_out "$SLURM_JOB_ID" "$left_out" # at once: Slurm soon ends this script
    those_that_wait_leave_it_out
}

those_that_wait_leave_it_out() {
    local job state
    [ -f "$RUN_FOLDER/slurm/jobs" ] || return 0
    while read -r job _; do
        state=$(scontrol show job -o "$job" 2>/dev/null) || continue
        if [ "$job" != "$SLURM_JOB_ID" ] && [[ $state == *" JobState=PENDING "* ]]; then
            leave_out "$job" "$(left_out_by "$job")"
        fi
    done <"$RUN_FOLDER/slurm/jobs"
}

left_out_by() {
    { ask_slurm show job -o "$1" || true; } | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p' | sed 's/(null)//'
}

leave_out() {
    if ask_slurm update "JobId=$1" "ExcNodeList=${2:+$2,}$bad_nodes"; then
        echo "job $1 leaves out $bad_nodes, which failed twice (noted in $FAILED_NODES)"
    fi
}
