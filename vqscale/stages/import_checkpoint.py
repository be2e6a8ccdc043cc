"""A checkpoint of rosinality/vq-vae-2-pytorch -> an exported folder, which every stage takes as `vqvae=`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vqscale import config as configs
from vqscale.files import sha256_of
from vqscale.models.community import convert
from vqscale.models.pretrained import load_into, read_torch, save_pretrained
from vqscale.sources import build

USAGE = "FILE OUT_DIR [key=value ...]"


@dataclass(frozen=True)
class ImportConfig:
    """What the file does not say."""

    resolution: int = 256  # pixels of the images that it was trained on
    rectified_skip: bool = False  # trained with a first ReLU in place (that port before 2021, and forks of it)


Config = ImportConfig


@dataclass(frozen=True)
class Request:
    file: Path
    out_dir: Path
    config: ImportConfig


def load(words: Sequence[str]) -> Request:
    """From `FILE OUT_DIR key=value …`. Raises ValueError as `config.from_words` does."""
    (file, out_dir), rest = configs.split_paths(words, f"import-checkpoint {USAGE}", 2)
    return Request(Path(file), Path(out_dir), configs.from_words(ImportConfig, rest))


def main(request: Request) -> None:
    """Write the folder. Raises ValueError for a file of another layout or anything that does not fit."""
    file, config = request.file, request.config
    settings, tensors = convert(read_torch(file), str(file), rectified_skip=config.rectified_skip)
    facts = {"resolution": config.resolution, "classes": [], "data": ""}
    model = build({"kind": "vqvae", "config": configs.as_dict(settings), **facts})
    load_into(model, tensors, file)
    origin = {"file": file.name, "sha256": sha256_of(file)}
    extra = {**facts, "weights": "imported", "provenance": origin}
    name = save_pretrained(request.out_dir, model, kind="vqvae", config=configs.as_dict(settings), extra=extra)
    print(f"{request.out_dir}: VQ-VAE for {config.resolution} px, {name}")
