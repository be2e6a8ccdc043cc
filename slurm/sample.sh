#!/usr/bin/env bash
#SBATCH --job-name=sample
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:USR2@180
# sbatch [flags] slurm/sample.sh CONFIG [key=value ...]: priors and VQ-VAE-2 -> sample shards, shared among the ranks of all nodes
# shellcheck source=slurm/common.sh
. "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\([^ ]*\)/.*|\1|p' | head -n 1)/common.sh"
run_stage sample "$@"
