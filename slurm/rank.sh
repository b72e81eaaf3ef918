#!/usr/bin/env bash
# One process of the job: its output goes to the job's log and to a log of its own.  Usage: rank.sh SCRIPT ARGUMENTS
set -euo pipefail
: "${RANK:?started by slurm/node.sh}"
# The deepspeed launcher numbers GPUs from 0, whichever of them Slurm has given to this job.
[ -z "$STEP_DEVICES" ] || export CUDA_VISIBLE_DEVICES=$STEP_DEVICES
[ -z "${RANK_PIDS:-}" ] || echo $$ >"$RANK_PIDS/$RANK" # for pass_signals.py
exec > >(exec tee -a "$RANK_LOGS/$SLURM_JOB_NAME-$SLURM_JOB_ID-rank-$RANK.log") 2>&1
exec python -u "$@"
