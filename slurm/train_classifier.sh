#!/usr/bin/env bash
#SBATCH --job-name=train_classifier
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:USR2@180
# sbatch [flags] slurm/train_classifier.sh CONFIG [key=value ...]: images, samples or reconstructions -> a classifier
# shellcheck source=slurm/common.sh
. "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\([^ ]*\)/.*|\1|p' | head -n 1)/common.sh"
run_stage train_classifier "$@"
