# vqscale in a container, for CPUs and for GPUs: pip's usual torch has CUDA, and needs only NVIDIA's driver of the host.
#
#   docker build -t vqscale .
#   docker build -t vqscale:cpu --build-arg TORCH_INDEX=URL .    URL: PyTorch's index of wheels for CPUs
#   docker run --rm --gpus all --shm-size=16g --user "$(id -u):$(id -g)" -v "$PWD:/work" vqscale doctor
#
# Loaders pass batches through /dev/shm, of which Docker gives 64 MB: --shm-size=16g, or --ipc=host as NCCL wants it between
# containers. apptainer.def takes the same steps.
FROM python:3.12-slim-bookworm
LABEL org.opencontainers.image.title="vqscale" \
      org.opencontainers.image.description="Distributed, large-scale training of VQ-VAE-2 and its PixelCNN priors" \
      org.opencontainers.image.licenses="Apache-2.0"
ARG TORCH_INDEX=

# torch.compile and Triton compile when a run starts; no package here compiles when it is installed.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN index="$TORCH_INDEX"; pip install --no-cache-dir ${index:+--index-url "$index"} torch torchvision
COPY pyproject.toml MANIFEST.in README.md LICENSE CHANGELOG.md /opt/vqscale/
COPY vqscale /opt/vqscale/vqscale
COPY configs /opt/vqscale/configs
COPY launch /opt/vqscale/launch
COPY slurm /opt/vqscale/slurm
RUN pip install --no-cache-dir "/opt/vqscale[hub,lite0]" && rm -r /opt/vqscale

# Any user may run it, with a home for caches: `--user` makes the files in /work the caller's.
RUN useradd --create-home vqscale && chmod 1777 /home/vqscale && install --directory --owner=vqscale /work
ENV HOME=/home/vqscale USER=vqscale
USER vqscale
WORKDIR /work
ENTRYPOINT ["vqscale"]
CMD ["--help"]
