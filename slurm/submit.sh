#!/usr/bin/env bash
# Queue the whole chain, each phase after those that it needs have succeeded; the AR baseline beside LaDiR.
#
# Usage: slurm/submit.sh [--sbatch-option=value ...] CONFIG [section.key=value ...]
#
# PHASES     another chain: entries separated by ';', each an entry point with sbatch options and settings of its own,
#            e.g. PHASES='train_vae --time=04:00:00; encode_latents --nodes=1'
# SNAPSHOTS  sbatch options and settings of jobs that ask the snapshots of every training with <phase>.train.snapshot_every
#            while it goes on, on GPUs of their own, e.g. SNAPSHOTS='--nodes=1 --gres=gpu:2 evaluate.num_questions=200'
#
# All variables: docs/cluster.md.
set -euo pipefail

if [ "${1:-}" = --help ]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
fi

fail() {
    echo "error: $*" >&2
    exit 2
}

options=()
while [[ ${1:-} == -* ]]; do
    [[ $1 == --* ]] || fail "write sbatch's options in their long form, --name=value: $1"
    options+=("$1")
    shift
done
[ $# -gt 0 ] || fail "no configuration; usage: slurm/submit.sh [--sbatch-option=value ...] configs/NAME.yaml [section.key=value ...]"
[ -f "$1" ] || fail "no configuration file '$1' (options for sbatch are written --name=value)"
config=$(realpath "$1")
shift
command -v sbatch >/dev/null || fail "no sbatch: this machine cannot submit to Slurm"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export LADIR_ROOT=$PWD

asks_for_gpus() {
    [[ -n ${PROCESSES_PER_NODE:-}${SBATCH_GRES:-}${SBATCH_GPUS:-}${SBATCH_GPUS_PER_NODE:-}${SBATCH_GPUS_PER_TASK:-} ]] ||
        [[ " $* ${PHASES:-} " =~ \ --(gres|gpus|gpus-per-node|gpus-per-task|gpus-per-socket)=  ]]
}
asks_for_gpus ${options[@]+"${options[@]}"} ||
    fail "no GPU asked for: add --gres=gpu:N --cpus-per-task=M (or set PROCESSES_PER_NODE=N for a run without GPUs)"

read -r -a python <<<"${CONTAINER:+$CONTAINER python}"
if [ ${#python[@]} -eq 0 ]; then
    python=("${VENV:-.venv}/bin/python")
    [ -x "${python[0]}" ] || python=(python3)
fi
[[ ${PHASES-train} =~ [a-z] ]] || [ -z "$PHASES" ] || fail "PHASES names no phase"
answer=$(PYTHONPATH="$LADIR_ROOT" "${python[@]}" slurm/settings.py --phases ${options[@]+"${options[@]}"} "$config" "$@") || exit 2
mapfile -t lines <<<"$answer"
run_folder=${lines[0]} stop_signal=${lines[1]}
phases=("${lines[@]:2}") # each behind what it begins after, see settings.py

mkdir -p "$run_folder/logs" "$run_folder/slurm" || fail "$run_folder cannot be written; choose another run.folder"
# Jobs read this copy, so that editing the file does not change what is queued.
submitted=$run_folder/slurm/submitted-$(date +%Y%m%d-%H%M%S)-$$.yaml
cp "$config" "$submitted"

export LADIR_QUEUED=1 # the programs' last lines then name no command to queue the next phase
jobs=()
cancel() {
    [ ${#jobs[@]} -eq 0 ] || scancel "${jobs[@]}"
}
trap cancel ERR
echo "run folder   $run_folder"
for phase in "${phases[@]}"; do
    read -r begin entry rest <<<"$phase"
    read -r -a words <<<"$entry $rest"
    [ -f "slurm/$entry.sbatch" ] || { cancel; fail "PHASES: no slurm/$entry.sbatch"; }
    own=(${options[@]+"${options[@]}"}) settings=()
    if [[ $entry =~ ^(export|table)$ ]]; then # write files: one node, no GPU
        own=(--nodes=1 --gres=none)
        for option in ${options[@]+"${options[@]}"}; do
            [[ $option =~ ^--(nodes|ntasks|gres|gpu) ]] || own+=("$option")
        done
    fi
    for word in "${words[@]:1}"; do
        if [[ $word == --* ]]; then own+=("$word"); else settings+=("$word"); fi
    done
    after=() when='' watched='' watched_phase=''
    if [[ $begin == +* ]]; then
        watched=${jobs[${begin//[!0-9]/}]} watched_phase=${begin#*:}
        after=(--dependency="after:$watched") when="  (beside $watched)"
    elif [ "$begin" != - ]; then
        needed=''
        for number in ${begin//:/ }; do needed+=:${jobs[$number]}; done
        after=(--dependency="afterok$needed" --kill-on-invalid-dep=yes) when="  (after ${needed:1})"
    fi
    job=$(TRAINING_JOB=$watched SNAPSHOTS_OF=$watched_phase sbatch --parsable --output="$run_folder/logs/%x-%j.log" --signal="$stop_signal@${STOP_SECONDS:-300}" \
        ${own[@]+"${own[@]}"} ${after[@]+"${after[@]}"} \
        "slurm/$entry.sbatch" "$submitted" "$@" ${settings[@]+"${settings[@]}"})
    job=${job%%;*} # with several clusters: ID;CLUSTER
    echo "job $job  ${words[*]}$when"
    jobs+=("$job")
    echo "$job ${words[*]}" >>"$run_folder/slurm/jobs" # python -m ladir status asks what waits in the queue
done
list=$(IFS=,; echo "${jobs[*]}")
echo "watch        squeue --jobs=$list"
printf 'status       %s -m ladir status %q --watch\n' "${python[*]}" "$run_folder"
printf 'logs         tail -F %q/logs/*.log\n' "$run_folder"
printf 'tensorboard  tensorboard --logdir %q\n' "$run_folder/tensorboard"
echo "stop it all  scancel ${jobs[*]}"
