#!/usr/bin/env bash
# Runs on every node of a step (LAUNCHER=srun: once per process): starts this node's processes with the launcher.
# Usage (from common.sh): srun bash slurm/node.sh training/ENTRY.py ARGUMENTS
set -euo pipefail
: "${SLURM_NODEID:?runs inside a Slurm step: submit slurm/*.sbatch}"

signals=(TERM USR1 USR2 "$STOP_SIGNAL")
trap '' "${signals[@]}"
export STEP_DEVICES=${CUDA_VISIBLE_DEVICES:-}
address=(--node_rank "$SLURM_NODEID" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
case $LAUNCHER in
    torchrun)
        command=(python slurm/pass_signals.py torchrun --nnodes "$NODES" --nproc_per_node "$PROCESSES" "${address[@]}" --no_python)
        ;;
    deepspeed)
        command=(python slurm/pass_signals.py deepspeed --hostfile "$HOSTFILE" --no_ssh "${address[@]}" --no_python --no_local_rank)
        ;;
    srun)
        command=(python slurm/pass_signals.py)
        export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$PROCESSES
        ;;
esac
# Launchers would die of a stop signal, so they never see it, and Slurm may send it to its own child alone.
exec python slurm/hold_signals.py "${signals[@]}" -- "${command[@]}" "$PWD/slurm/rank.sh" "$@"
