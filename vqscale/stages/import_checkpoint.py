"""A checkpoint of rosinality/vq-vae-2-pytorch -> an exported folder, which every stage takes as `vqvae=`."""

from collections.abc import Sequence
from dataclasses import dataclass

from vqscale import config as configs
from vqscale.config import Request, read_request
from vqscale.fields import PositiveInt
from vqscale.files import sha256_of
from vqscale.models.community import convert
from vqscale.models.pretrained import load_into, read_torch, save_pretrained
from vqscale.sources import build, check_model

USAGE = "FILE OUT_DIR [key=value ...]"


@dataclass(frozen=True)
class ImportConfig:
    """What the file does not say."""

    resolution: PositiveInt = 256  # pixels of the images that it was trained on
    rectified_skip: bool = False  # trained with a first ReLU in place (that port before 2021, and forks of it)


Config = ImportConfig


def load(words: Sequence[str]) -> Request[ImportConfig]:
    """From `FILE OUT_DIR key=value …`; see `read_request`."""
    return read_request(ImportConfig, words, f"import-checkpoint {USAGE}", paths=2)


def main(request: Request[ImportConfig]) -> None:
    """Write the folder. Raises ValueError for a file of another layout or anything that does not fit."""
    config, (file, out_dir) = request.config, request.paths
    settings, tensors = convert(read_torch(file), str(file), rectified_skip=config.rectified_skip)
    facts = {"resolution": config.resolution, "classes": [], "data": ""}
    description = {"kind": "vqvae", "config": configs.as_dict(settings), **facts}
    check_model(description, tensors, file)
    model = build(description)
    load_into(model, tensors, file)
    origin = {"file": file.name, "sha256": sha256_of(file)}
    extra = {**facts, "weights": "imported", "provenance": origin}
    name = save_pretrained(out_dir, model, kind="vqvae", config=configs.as_dict(settings), extra=extra)
    print(f"{out_dir}: VQ-VAE for {config.resolution} px, {name}")
