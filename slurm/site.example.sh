# shellcheck shell=bash disable=SC2034
# What is peculiar to your cluster. Copy it to slurm/site.sh, which the job scripts and pipeline.sh source, or name another
# file in VQSCALE_SITE. Every line is optional.

# module load python cuda                            # what the nodes need before Python starts
# PYTHON=$HOME/venvs/vqscale/bin/python              # default: .venv/bin/python of this clone, else python
# CONTAINER=(apptainer exec --nv "$HOME/vqscale.sif") # words in front of every Python; with an image, PYTHON=python

# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0   # the interface between nodes
# export TMPDIR=/scratch/$USER                       # node-local scratch

# STRATEGY=fsdp                                      # which launch/*.yaml; or per job: STRATEGY=fsdp sbatch ...
# HEALTH_CHECK='test "$(nvidia-smi --list-gpus | wc -l)" -ge "${SLURM_GPUS_ON_NODE:-0}"'   # per node, before each start

# sbatch flags that pipeline.sh gives to every stage, and those of one stage.
# FLAGS=(--account=ACCOUNT --partition=gpu --time=24:00:00)
# FLAGS_pack=(--partition=cpu --cpus-per-task=32)
# FLAGS_train_vqvae=(--nodes=2 --gpus-per-node=8)
# FLAGS_extract_codes=(--nodes=2 --gpus-per-node=8)
# FLAGS_train_prior=(--nodes=16 --gpus-per-node=8)
# FLAGS_train_classifier=(--nodes=2 --gpus-per-node=8)
# FLAGS_sample=(--nodes=4 --gpus-per-node=8)
# FLAGS_evaluate=(--nodes=1 --gpus-per-node=8)
# GUARD_FLAGS=(--account=ACCOUNT --partition=cpu)    # of the small jobs that look after the others
