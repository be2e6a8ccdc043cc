#!/usr/bin/env bash
#SBATCH --job-name=extract_codes
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:USR2@180
# sbatch [flags] slurm/extract_codes.sh CONFIG [key=value ...]: image shards -> code shards, shared among the ranks of all nodes
# shellcheck source=slurm/common.sh
. "$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\([^ ]*\)/.*|\1|p' | head -n 1)/common.sh"
run_stage extract_codes "$@"
