#!/bin/bash
# Trains under SLURM on any number of machines, and goes on by itself after a time limit or a preemption:
#
#   sbatch --nodes=2 --gpus-per-node=4 --ntasks-per-node=4 scripts/slurm_train.sh recipe=bert_mlm trainer=ddp
#
# One task for each GPU. What follows the script's name goes on to train.py. The run folder is named after the job, so a
# requeued job finds its checkpoints. The scheduler warns two minutes before the limit; the run saves and ends with 138
# (128 + SIGUSR1), and is put back into the queue. A preempted job (SIGTERM, 143) is requeued by the scheduler itself.
#SBATCH --job-name=lion-train
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
set -u

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# --kill-on-bad-exit ends the other tasks when one fails; --label says which task a line is from. The signal goes to the
# tasks, and not to this script.
srun --kill-on-bad-exit=1 --label "${PYTHON:-python}" train.py resume=auto "$@"
code=$?

if [ "$code" -eq 138 ]; then
    echo "the time is up: job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
