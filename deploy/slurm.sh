#!/bin/bash
# A search on Slurm: each task of the array is one machine of the same study. From the project's folder, with a
# study.yaml in it, both on a disk that all nodes see:
#   export MLFLOW_TRACKING_URI=...   # the password is in ~/.pgpass
#   sbatch deploy/slurm.sh
#SBATCH --job-name=skin-resnet
#SBATCH --array=1-4
#SBATCH --ntasks=1 --cpus-per-task=8 --gpus-per-task=1
#SBATCH --time=4:00:00 --signal=USR1@60
#SBATCH --requeue --open-mode=append --output=search-%a.log
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since Slurm 22.05, srun does not take it from the job
srun .venv/bin/skin-resnet search --config study.yaml
code=$?
# 138: the time is nearly up, and SIGUSR1 has ended the search cleanly. It continues when there is time again.
if [ "$code" = 138 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
