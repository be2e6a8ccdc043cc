#!/usr/bin/env bash
#SBATCH --job-name=train_prior
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:USR2@180
# sbatch [flags] slurm/train_prior.sh CONFIG [key=value ...]: code shards -> the prior of one level, on any number of nodes
# shellcheck source=slurm/common.sh
. "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\([^ ]*\)/.*|\1|p' | head -n 1)/common.sh"
run_stage train_prior "$@"
