#!/usr/bin/env bash
#SBATCH --job-name=teacher-dump
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@180
#SBATCH --open-mode=append
#
# A teacher pass under SLURM: one torchrun on each node, one rank for each GPU. Send it off from the environment that
# TeacherCache is installed in, with the store on a file system that all nodes share; options of sbatch go before the script.
#
#   sbatch slurm.sh dump.yaml sharding.kind=zero3 sharding.size=8
#   sbatch --array=0-3 slurm.sh dump.yaml        four jobs that fill one store at once, each beginning when SLURM has room for it
#
# A job that comes to the end of its time is told 180 s before, finishes or drops the shards it is at, and queues up again. After a
# node has failed, or for a more urgent job, SLURM does that (--requeue). Errors do not queue up again: they would come back.
set -euo pipefail

grace=${GRACE:-120}                                  # seconds in which shards are still finished
ranks=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((10000 + SLURM_JOB_ID % 20000))               # jobs of an array may share a node
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$((grace + 30)) # until torchrun kills; 30 s otherwise
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((${SLURM_CPUS_PER_TASK:-1} + ranks - 1) / ranks))}

asked=
trap 'asked=yes; kill -TERM "$step"' TERM
srun torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$ranks" \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="${nodes%%$'\n'*}:$port" \
    -m teacher_dump.cli run --grace="$grace" "$@" &
step=$!

code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do                # a signal ends wait, not the step
    code=0
    wait "$step" || code=$?
done
if [[ -n $asked && $code -ne 0 ]]; then              # torchrun's code is the same if all was done in time; the next run then ends at once
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
