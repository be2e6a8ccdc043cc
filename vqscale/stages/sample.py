"""VQ-VAE + priors -> sample shards: ancestral sampling, level by level from the top, then decoding.

Sample i has the same pixels whatever the number of ranks and restarts: its randomness is addressed by (seed, i), and
the batch it is computed in is fixed. The pictures beside the shards (grid.png, images/) are made of the shards alone,
at every start.
"""

import json
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from vqscale import runtime
from vqscale.batch import to_host
from vqscale.config import StageConfig, run_of
from vqscale.data.beside import use_beside
from vqscale.data.images import decode_image, to_uint8
from vqscale.data.packing import Encoding, encode_image
from vqscale.data.parts import read_samples
from vqscale.data.shards import Manifest, ShardWriter, missing_file, shard_info
from vqscale.data.shardtable import ShardTable, survey
from vqscale.evaluation.classify import CLASS_PROBABILITY, ImageClassifier
from vqscale.evaluation.features import NEED_A_PATH
from vqscale.evaluation.figures import grid_png, label_of_class, upscale_for
from vqscale.fields import Choice, Fraction, NonNegativeFloat, NonNegativeInt, PathText, PositiveFraction, PositiveInt
from vqscale.models.sampling import PER_LEVEL, SCHEDULES, check_guidance, sample_codes
from vqscale.sources import Source, build, load_model
from vqscale.text import error_prefix
from vqscale.topology import ALONE, Topology, cores


@dataclass(frozen=True)
class SampleConfig(StageConfig):
    """Class-conditional samples as a data set of kind `samples`."""

    outputs: ClassVar[tuple[str, ...]] = (
        "[0-9]*.tar",
        "[0-9]*.index.safetensors",
        "dataset.json",
        "shards-*.safetensors",
        "grid.png",
        "images",
    )
    batch_key: ClassVar[str] = "batch"

    vqvae: PathText = run_of("train_vqvae")  # the VQ-VAE: a run or an exported folder
    prior_top: PathText = run_of("train_prior_top")  # the prior of the top level, if there is such a level
    prior_middle: PathText = run_of("train_prior_middle")  # the prior of the middle level, if there is such a level
    prior_bottom: PathText = run_of("train_prior_bottom")  # the prior of the bottom level, if there is such a level
    rejection: PathText = "none"  # a classifier of real images: store with each sample how likely it finds its class
    weights: PathText = ""  # path of the weights of the network below that classifier, where it needs one
    weights_kind: Annotated[str, Choice("", "ema", "raw")] = ""  # "" = ema if there is one
    classes: str | list[str] = "all"  # all, or a list of class names or indices
    samples_per_class: PositiveInt = 10  # how many of each
    temperature: dict[str, NonNegativeFloat] = field(default_factory=dict)  # by level: {top: 0.95}; 1 = as trained
    temperature_end: dict[str, NonNegativeFloat] = field(default_factory=dict)  # of the last code; see docs/priors.md
    top_k: dict[str, NonNegativeInt] = field(default_factory=dict)  # among the k likeliest codes; 0 = all
    top_p: dict[str, PositiveFraction] = field(default_factory=dict)  # among the likeliest of this mass; 1 = all
    guidance: dict[str, NonNegativeFloat] = field(default_factory=dict)  # classifier-free guidance weight; 0 = off
    guidance_schedule: dict[str, Annotated[str, Choice(*SCHEDULES)]] = field(default_factory=dict)  # along the codes
    guidance_interval: dict[str, list[Fraction]] = field(default_factory=dict)  # guide only there; [0, 1] = all codes
    precision: Annotated[str, Choice("fp32", "bf16")] = "fp32"  # of the priors; decoding is in fp32
    graphs: bool = True  # a GPU replays each row of codes as a CUDA graph; false = kernel by kernel, for debugging
    batch: PositiveInt = 32  # samples drawn at a time, one block of consecutive ids
    blocks_per_shard: PositiveInt = 8  # blocks in one shard
    grid_columns: PositiveInt = 10  # samples per class in grid.png
    images: bool = False  # also write each sample as images/<class>/<id>.png

    def __post_init__(self) -> None:
        for level, interval in self.guidance_interval.items():
            with error_prefix(level):
                check_guidance(self.guidance_schedule.get(level, "constant"), interval)


Config = SampleConfig
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# By key all parts of a block's samples but their pictures; and those, uint8 [b, 3, R, R], perhaps with padding behind.
_Block = tuple[dict[str, dict[str, bytes]], Callable[[], dict[str, Tensor]]]
_GRID_PIXELS = 100_000_000  # of grid.png, at most


@dataclass(frozen=True)
class Chain:
    """The models that turn a class into an image."""

    vqvae: Source
    priors: dict[str, Source]  # by level, top first
    judge: ImageClassifier | None = None
    weights: dict[str, Any] = field(default_factory=dict)  # of priors, as sampling reads them, once they were used

    @property
    def classes(self) -> list[str]:
        return list(self.priors["top"].description["classes"])

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of each model, by its config key."""
        priors = {f"prior_{level}": prior.fingerprint for level, prior in self.priors.items()}
        judge = {"rejection": self.judge.source.fingerprint} if self.judge else {}
        return {"vqvae": self.vqvae.fingerprint, **priors, **judge}


def main(config: SampleConfig) -> None:
    """Sample into `config.run_dir`. Raises ValueError for models that do not belong together or an unknown class."""
    with runtime.run(config, "sample") as run:
        try:
            chain = load_chain(config, run.topology.device, run.topology)
        except FileNotFoundError as error:
            if not run.was_done or missing_file(run.run_dir, run.topology):
                raise
            runtime.log.info("the models are not compared with those of the samples: %s", error)
        else:
            run.check_inputs(chain.fingerprints)
            _draw_missing(config, chain, run)
        if run.topology.is_main:
            _write_pictures(config, run)
        run.topology.barrier()


def _draw_missing(config: SampleConfig, chain: Chain, run: runtime.Run) -> None:
    """The shards that are not there yet, then dataset.json."""
    labels = [c for c in chosen_classes(config.classes, chain.classes) for _ in range(config.samples_per_class)]
    if not labels:
        raise ValueError(f"nothing to sample: {config.samples_per_class} samples of {len(chain.classes)} classes")
    size, topology = config.batch * config.blocks_per_shard, run.topology
    paths = [run.run_dir / f"{number:06d}.tar" for number in range(-(-len(labels) // size))]
    if run.was_done and not missing_file(run.run_dir, topology):
        runtime.log.info("nothing left to do: the samples are in %s", run.run_dir)
        return
    mine = [(path, range(n * size, min(len(labels), (n + 1) * size))) for n, path in enumerate(paths)]
    mine = mine[topology.rank :: topology.world_size]
    missing = [(path, ids) for path, ids in mine if shard_info(path) is None]
    run.images_seen += sum(len(ids) for _, ids in mine) - sum(len(ids) for _, ids in missing)
    bar = tqdm(total=len(labels), unit="img", disable=not topology.is_main, desc="sample")

    def write(blocks: Iterator[_Block]) -> None:
        with closing(_encoded(blocks, chain, topology)) as samples:
            for path, ids in missing:
                with ShardWriter(path) as writer:
                    for key, parts in islice(samples, len(ids)):
                        writer.write(key, parts)
                        bar.update()
                run.images_seen += len(ids)

    with run.stoppable(), bar:
        drawn = _drawn(config, chain, labels, [ids for _, ids in missing], run)
        use_beside(drawn, write, waiting=int(topology.device.type == "cuda"))
    rows = survey(topology, len(paths), lambda n: shard_info(paths[n]))
    if topology.is_main:
        shards = ShardTable.of_rows(rows, [path.name for path in paths])
        _write_manifest(config, chain, run.run_dir, shards)


def load_chain(config: SampleConfig, device: torch.device, topology: Topology = ALONE) -> Chain:
    """The VQ-VAE and one prior per level, checked against each other and against the options. Collective."""
    model = partial(load_model, device=device, weights_kind=config.weights_kind, topology=topology)
    vqvae = model(config.vqvae, "vqvae")
    priors: dict[str, Source] = {}
    for name in vqvae.model.level_names:
        path = getattr(config, f"prior_{name}")
        prior = model(path, f"prior_{name}")
        if prior.description["level"] != name:
            raise ValueError(f"prior_{name}={path}: this is a prior of the {prior.description['level']} level")
        if prior.description["tokenizer"] != vqvae.tokenizer:
            raise ValueError(
                f"prior_{name}={path}: trained on codes of {prior.description['tokenizer']}, "
                f"but vqvae={config.vqvae} is {vqvae.tokenizer}"
            )
        priors[name] = prior
    chain = Chain(vqvae, priors, load_judge(config, priors["top"].description["classes"], device, topology))
    check_options(config, chain)
    return chain


def load_judge(
    config: SampleConfig, classes: list[str], device: torch.device, topology: Topology
) -> ImageClassifier | None:
    """The classifier whose opinion is stored with each sample (Razavi et al. 2019, section 3.4)."""
    if config.rejection == "none":
        return None
    judge = ImageClassifier.load(config.rejection, device, dict.fromkeys(NEED_A_PATH, config.weights), topology)
    learned_from = judge.source.description["learned_from"]
    if learned_from != "images":
        raise ValueError(f"rejection={config.rejection}: learned from {learned_from}, not from real images")
    if judge.classes != list(classes):
        raise ValueError(f"rejection={config.rejection}: has other classes ({len(judge.classes)}) than the priors")
    return judge


def check_options(config: SampleConfig, chain: Chain) -> None:
    """Raises ValueError for an option of a level that the models do not have, or that its prior cannot follow."""
    for option in PER_LEVEL:
        for level in getattr(config, option):
            if level not in chain.priors:
                levels = ", ".join(chain.priors)
                raise ValueError(f"{option}.{level}: the levels of vqvae={config.vqvae} are {levels}")
    for level, weight in config.guidance.items():
        prior = chain.priors[level]
        if weight and not prior.model.config.class_dropout:
            raise ValueError(
                f"guidance.{level}={weight}: prior_{level}={prior.path} was trained with model.class_dropout=0 "
                "and has never seen a sample without its class"
            )


def chosen_classes(asked: str | Sequence[str], classes: Sequence[str]) -> list[int]:
    """Class indices of "all", or of a list of names and indices. Raises ValueError naming what is not a class."""
    if asked == "all":
        return list(range(len(classes)))
    known = {str(index): index for index in range(len(classes))} | {name: i for i, name in enumerate(classes)}
    words = [asked] if isinstance(asked, str) else asked
    for word in words:
        if word not in known:
            raise ValueError(f"classes: {word!r} is no class name of the {len(classes)}, and no index below that")
    return [known[word] for word in words]


def _drawn(
    config: SampleConfig, chain: Chain, labels: list[int], shards: Iterable[range], run: runtime.Run
) -> Iterator[_Block]:
    """The samples of these shards, one fixed block at a time; a shard's last block is padded with its last sample."""
    for first, stop in ((first, ids.stop) for ids in shards for first in range(ids.start, ids.stop, config.batch)):
        run.poll()
        block = [min(i, stop - 1) for i in range(first, first + config.batch)]
        label = torch.tensor([labels[i] for i in block], device=run.topology.device)
        images = draw(config, chain, label, torch.tensor(block, device=run.topology.device), run.poll)
        opinions = chain.judge.probabilities_of(images, label).tolist() if chain.judge else []
        parts: dict[str, dict[str, bytes]] = {}
        for i in range(first, min(first + config.batch, stop)):
            about: dict[str, Any] = {"sample": i, "seed": config.seed}
            if opinions:
                about[CLASS_PROBABILITY] = opinions[i - first]
            parts[f"{i:09d}"] = {"cls": str(labels[i]).encode(), "json": json.dumps(about).encode()}
        yield parts, to_host({"image": images})


def _encoded(
    blocks: Iterator[_Block], chain: Chain, topology: Topology
) -> Generator[tuple[str, dict[str, bytes]], None, None]:
    """(key, parts) of each sample in turn. A block's pictures are encoded in threads: zlib leaves Python's lock."""
    encoding = Encoding(chain.vqvae.description["resolution"], "png", quality=0)
    with ThreadPoolExecutor(max(1, cores() // topology.local_world_size)) as pool:
        for parts, drawn in blocks:
            pictures = pool.map(partial(encode_image, encoding=encoding), drawn()["image"].numpy()[: len(parts)])
            for (key, others), png in zip(parts.items(), pictures, strict=True):
                yield key, {"png": png, **others}


@torch.inference_mode()
def draw(
    config: SampleConfig, chain: Chain, label: Tensor, sample_ids: Tensor, between: Callable[[], None] = lambda: None
) -> Tensor:
    """Images uint8 [b, 3, R, R] of classes int64 [b], on their device. `between` is called after each row of codes."""
    codes: list[Tensor] = []
    for level in chain.priors:
        codes.append(draw_level(config, chain, level, label, codes, sample_ids, between))
    return to_uint8(chain.vqvae.model.decode(codes))


def draw_level(
    config: SampleConfig,
    chain: Chain,
    level: str,
    label: Tensor,
    upper: Sequence[Tensor],
    sample_ids: Tensor,
    between: Callable[[], None],
) -> Tensor:
    """Codes int64 [b, h, w] of one level, given those of the levels above, top first."""
    prior = chain.priors[level].model
    options = {option: getattr(config, option)[level] for option in PER_LEVEL if level in getattr(config, option)}
    if level not in chain.weights:
        chain.weights[level] = prior.sampling_weights(_DTYPES[config.precision])
    return sample_codes(
        prior,
        label,
        upper,
        seed=config.seed,
        sample_ids=sample_ids,
        weights=chain.weights[level],
        graphs=config.graphs,
        progress=lambda done, rows: between(),
        **options,
    )


def _write_manifest(config: SampleConfig, chain: Chain, folder: Path, shards: ShardTable) -> None:
    provenance = {
        "vqvae": chain.vqvae.fingerprint,
        "priors": {level: prior.fingerprint for level, prior in chain.priors.items()},
        "tokenizer": chain.vqvae.tokenizer,
        "training_transform": chain.priors["top"].description.get("transform", {}),
        "seed": config.seed,
        "samples_per_class": config.samples_per_class,
        **{option: dict(getattr(config, option)) for option in PER_LEVEL},
        "precision": config.precision,
        "rejection": chain.judge.identity() if chain.judge else {},
    }
    transform = {"resolution": chain.vqvae.description["resolution"], "format": "png"}
    Manifest.of("samples", shards, chain.classes, transform, provenance).save(folder)


# --- pictures beside the shards ---------------------------------------------------------------------------------------


def _write_pictures(config: SampleConfig, run: runtime.Run) -> None:
    """grid.png with one row per class and, with images=true, every sample as a file."""
    manifest = Manifest.load(run.run_dir)
    columns = min(config.grid_columns, config.samples_per_class)
    firsts = range(0, manifest.num_samples, config.samples_per_class)
    side = manifest.transform["resolution"] * upscale_for(manifest.transform["resolution"])
    most = max(1, _GRID_PIXELS // (columns * side**2))
    if len(firsts) > most:
        runtime.log.info("grid.png has the first %d of %d classes", most, len(firsts))
        firsts = firsts[:most]
    positions = [first + column for first in firsts for column in range(columns)]
    rows: dict[str, list[Tensor]] = {}
    for sample in read_samples(run.run_dir, ["png"], positions):
        label = label_of_class(manifest.classes[sample.label], sample.label)
        rows.setdefault(label, []).append(decode_image(sample.parts["png"]))
    grid_png(run.run_dir / "grid.png", samples=rows)
    if config.images:
        _write_images(run, manifest)


def _write_images(run: runtime.Run, manifest: Manifest) -> None:
    """images/<class>/<id>.png: those that are missing or of another length."""
    folder, names = run.run_dir / "images", folder_names(manifest.classes)
    for path in (folder, *(folder / name for name in names)):
        if path.is_symlink():
            raise ValueError(f"{path} is a link; images are written into the run directory only")
    with run.stoppable():
        for sample in read_samples(run.run_dir, ["png"]):
            run.poll()
            path, data = folder / names[sample.label] / f"{sample.key}.png", sample.parts["png"]
            if path.is_symlink() or not path.is_file() or path.stat().st_size != len(data):
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_suffix(".tmp")
                temporary.write_bytes(data)
                os.replace(temporary, path)


def folder_names(classes: Sequence[str]) -> list[str]:
    """A folder's name for each class: the class's own, where every file system takes it and no other class has it."""
    names: dict[str, str] = {}  # without regard to case -> as it is
    for label, name in enumerate(classes):
        cleaned = re.sub(r'[/\\:*?"<>|]', "_", name).strip(". ")
        usable = cleaned and len(cleaned.encode()) <= 200 and cleaned.casefold() not in names
        cleaned = cleaned if usable else f"{label:06d}"
        while cleaned.casefold() in names:
            cleaned += "_"
        names[cleaned.casefold()] = cleaned
    return list(names.values())


def plan(config: SampleConfig) -> str:
    """Sizes, for --dry-run."""
    chain = load_chain(config, torch.device("cpu"))
    classes = chosen_classes(config.classes, chain.classes)
    total = len(classes) * config.samples_per_class
    caches = {level: bytes_per_sample(prior, config) for level, prior in chain.priors.items()}
    return (
        f"\nsamples: {total:,} of {len(classes)} classes, {', '.join(caches)}"
        f"\nmemory of a batch of {config.batch}, weights apart: "
        + ", ".join(f"{level} {config.batch * size / (1 << 20):,.1f} MiB" for level, size in caches.items())
    )


def bytes_per_sample(prior: Source, config: SampleConfig) -> int:
    """What one sample's caches hold while this prior draws; twice that of one row under guidance."""
    rows = 2 if config.guidance.get(prior.description["level"]) else 1
    with torch.device("meta"), torch.inference_mode():
        empty: Any = build(prior.description)
        return rows * empty.sampling_weights(_DTYPES[config.precision]).state(1).bytes_per_sample()
