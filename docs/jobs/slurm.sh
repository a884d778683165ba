#!/bin/bash
# Trains on several machines under Slurm: sbatch docs/jobs/slurm.sh
# DATA and RUN lie on a folder that all machines share. A job that is queued again, after its time
# or the loss of a machine, goes on from the last checkpoint.
#SBATCH --job-name=segkern
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

DATA=${DATA:?the folder of the data}
RUN=${RUN:?the folder of the run}

if ls "$RUN"/checkpoints/[0-9]* > /dev/null 2>&1; then
  train=(train --resume "$RUN")
else
  train=(train --data.root "$DATA" --output "$RUN")
fi
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
exec srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:29400" \
  --module segkern "${train[@]}"
