#!/bin/bash
#SBATCH --job-name=nanodpo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
# A run that goes on until it is finished, one process a GPU, on one machine or (--nodes) several with a shared folder:
#
#     sbatch examples/launch/slurm.sh examples/real_dpo.yaml --model_name M --train_file_path D --output_dir out \
#         --deepspeed examples/launch/zero3.json
#
# SCRIPT=score.py before that command runs score.py with the flags that follow.
#
# Two minutes before its time is up, or before it gives way to another job, Slurm sends SIGTERM: the run saves what is
# done and ends with 75, as it does where the network between its machines is cut, and the job goes back into the queue.
# The same command then goes on from there.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# From Slurm 22.05 on srun does not take over the job's --cpus-per-task; without it a process would have one core.
srun ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=0 "${PYTHON:-.venv/bin/python}" "${SCRIPT:-train.py}" "$@"
code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
