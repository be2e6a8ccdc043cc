"""What trainers share: a config, a data set and a model's description -> a run of `fit`, or the text of a dry run."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vqscale.batch import Batch
from vqscale.config import flatten
from vqscale.data.cache import Cache
from vqscale.data.loader import Read, build_loader
from vqscale.data.sequential import sequential_batches
from vqscale.data.shards import Manifest
from vqscale.engine.footprint import step_flops
from vqscale.engine.loop import AfterStep, Evaluate, FitConfig, StepFn, fit, resumes
from vqscale.engine.parallel import Initialise, compile_units, make_engine
from vqscale.engine.side_work import SideWork
from vqscale.engine.tensors import Tensors
from vqscale.files import read_json, write_json
from vqscale.models.init import fill, initialise
from vqscale.models.pretrained import check_fits
from vqscale.rundir import INIT
from vqscale.runtime import Run
from vqscale.sources import Source, build, encoding_fingerprint, load_model, role_of

_HELD_OUT_BATCH = 64  # images per rank
_INPUTS = ("data", "tokenizer", "vqvae")  # whose fingerprints a description may have

log = logging.getLogger("vqscale")


@contextlib.contextmanager
def inputs_may_be_away(config: FitConfig, run: Run) -> Iterator[None]:
    """Around a trainer's work: a run that is done stays so, whatever has become of its inputs."""
    try:
        yield
    except FileNotFoundError as error:
        seen = run.previous_status.get("images_seen", 0)
        if not run.was_done or seen < config.total_images:
            raise
        run.images_seen = seen
        log.info("nothing left to do: already trained on %s images (%s)", f"{seen:,}", error)


def train(
    config: FitConfig,
    run: Run,
    *,
    folder: Path,
    read: Read,
    description: dict[str, Any],
    step_fn: StepFn,
    evaluate: Evaluate,
    prepare: Callable[[Any], None] | None = None,
    after_step: AfterStep | None = None,
    side_work: SideWork | None = None,
    freeze: Sequence[str] = (),
) -> None:
    """Build the model of `description` and fit it to the data set in `folder`, or go on where the run ended.

    `prepare(model)`: called on all ranks with the initialised, unwrapped model, unless there is a checkpoint; without
    it the model is built on the meta device. `after_step(model, …)`: see `fit`. `side_work`: whose clock starts with
    the training. `freeze`: what `model.freeze` takes; these parts must come from `config.init`.

    Raises ValueError where the weights of `config.init` are not the model's.
    """
    topology = run.topology
    run.check_inputs({key: value for key in _INPUTS if (value := description.get(key))})
    loader = build_loader(
        folder,
        read=read,
        global_batch=config.global_batch,
        micro_batch=config.micro_batch,
        rank=topology.rank,
        world_size=topology.world_size,
        seed=config.seed,
        shuffle_window=config.shuffle_window,
        workers=config.workers,
        max_bad_fraction=config.max_bad_fraction,
        pin_memory=topology.device.type == "cuda",
        bad_path=run.run_dir / "bad.jsonl",
        cache=Cache.of(config),
        gather=topology.gather,
    )
    with torch.device("cpu" if prepare else "meta"):
        model = build_model(description, freeze)
    resumed = resumes(run)
    start, facts = _first_weights(config, run, description, model, freeze, resumed)
    description = description | facts
    if prepare:
        start(model)
        if not resumed:
            prepare(model)
    if config.compile:
        compile_units(model, topology.strategy)
    accumulation = loader.micro_batches_per_step
    engine = make_engine(model, topology, config, accumulation, start)
    del start  # and the weights in it
    if side_work is not None:
        side_work.start()
    fit(
        engine,
        loader,
        step_fn,
        config=config,
        run=run,
        description=description,
        after_step=partial(after_step, model) if after_step else None,
        evaluate=evaluate,
        flops_per_image=flops_per_image(description, step_fn, topology.device, freeze),
    )
    if side_work is not None:
        side_work.log_total()


def build_model(description: Mapping[str, Any], freeze: Sequence[str] = ()) -> Any:
    """The model of a description, on the default device; `freeze`: what `model.freeze` takes."""
    model: Any = build(description)
    if freeze:
        model.freeze(freeze)
    return model


def _first_weights(
    config: FitConfig, run: Run, description: Mapping[str, Any], model: Any, freeze: Sequence[str], resumed: bool
) -> tuple[Initialise, dict[str, Any]]:
    """(what fills a model, what its description says of `config.init`). A resumed run does not read `config.init`."""
    draw = partial(initialise, seed=config.seed)
    if not config.init:
        for key, value in (("freeze", list(freeze)), ("init_ignore", config.init_ignore)):
            if value:
                raise ValueError(f"{key}={value} needs init=, the run or exported folder to start from")
        return draw, {}
    path = run.run_dir / INIT
    if resumed:
        return draw, run.topology.on_main(lambda: read_json(path))
    source = load_model(config.init, role_of(description), topology=run.topology)
    tensors = _tensors_of(source, model, config)
    facts = {"init": source.fingerprint}
    _warn_of_differences(source, description, config)
    if freeze:
        _refuse_other_encoding(source, description, model, tensors, config)
    if set(freeze) == {"encoder", "quantizer"}:
        facts |= {"tokenizer": source.tokenizer, "encoding": encoding_fingerprint(source.model)}
    if run.topology.is_main:
        write_json(path, facts)
    log.info("starting from %s, %s", config.init, source.fingerprint)
    return partial(_fill_from, tensors, draw), facts


def _fill_from(tensors: Tensors, draw: Initialise, model: Any) -> None:
    draw(model)
    own = model.state_dict()
    for name, tensor in tensors.items():
        fill(own[name], tensor)


def _tensors_of(source: Source, model: Any, config: FitConfig) -> Tensors:
    """Those to start from. Raises ValueError naming a tensor that does not fit the model, or a useless prefix."""
    tensors = source.model.state_dict()
    for prefix in config.init_ignore:
        if not any(name.startswith(prefix) for name in [*tensors, *model.state_dict()]):
            raise ValueError(f"init_ignore: no tensor's name begins with {prefix!r}; there is {next(iter(tensors))}, …")
    return check_fits(model, tensors, f"init={source.path}", config.init_ignore)


def _warn_of_differences(source: Source, description: Mapping[str, Any], config: FitConfig) -> None:
    here = dict(flatten(description["config"]))
    for key, there in flatten(source.description["config"]):
        if here.get(key, there) != there:
            log.warning("init=%s: trained with model.%s=%s, now %s", config.init, key, there, here[key])
    for key in ("tokenizer", "classes") if description["kind"] == "prior" else ():
        if source.description[key] != description[key]:
            log.warning("init=%s: trained with other %s than those of the data", config.init, key)


def _refuse_other_encoding(
    source: Source, description: Mapping[str, Any], model: Any, tensors: Tensors, config: FitConfig
) -> None:
    """Frozen parts must be the source's, and compute what they compute there."""
    if missing := sorted(set(model.encoding_names()) - tensors.keys()):
        raise ValueError(f"init_ignore={config.init_ignore} leaves out {missing[0]}, on which frozen codes depend")
    there, here = (dict(flatten(one)) for one in (source.description, description))
    for key in ("resolution", "config.rectified_skip"):
        if there.get(key) != here[key]:
            raise ValueError(f"init={source.path}: {key} is {there.get(key)}, here {here[key]}; freeze needs the same")


def blank_batch(description: Mapping[str, Any], count: int) -> Batch:
    """`count` samples of zeros, of the shapes that the model of a description trains on."""
    batch: dict[str, Any] = {name: torch.zeros(count, dtype=torch.int64) for name in ("label", "position")}
    if description["kind"] == "prior":
        levels = [*("top", "middle")[: len(description["upper_grids"])], description["level"]]
        for level, grid in zip(levels, [*description["upper_grids"], description["grid"]], strict=True):
            batch[level] = torch.zeros(count, *grid, dtype=torch.int16)
    else:
        side = description["resolution"]
        batch["image"] = torch.zeros(count, 3, side, side, dtype=torch.uint8)
    return cast(Batch, batch)


def flops_per_image(
    description: Mapping[str, Any], step_fn: StepFn, device: torch.device | str = "cpu", freeze: Sequence[str] = ()
) -> int:
    """FLOPs of a training step, forward and backward, without what checkpointing computes again; nothing is computed.

    The forward of a frozen network, whose outputs the model learns from, counts; its weights are on `device`.
    """
    frozen = description.get("vqvae") or description.get("features")
    mode = FakeTensorMode(allow_non_fake_inputs=True) if frozen else contextlib.nullcontext()
    with mode, torch.device(device if frozen else "meta"):
        model = build_model(description, freeze).eval()  # dropout and codebook statistics need none
        batch = blank_batch(description, 1)
        for unit in model.wrap_units():
            unit.activation_checkpointing = False
        return step_flops(model, lambda: step_fn(model, batch)[0])


def held_out_batches(config: FitConfig, run: Run, folder: Path, read: Read, limit: int) -> Iterator[Batch]:
    """The first `limit` samples (0 = all) over all ranks, each once; left when the run is asked to stop."""
    for batch in sequential_batches(
        folder,
        read=read,
        batch=min(_HELD_OUT_BATCH, limit or _HELD_OUT_BATCH),
        rank=run.topology.rank,
        world_size=run.topology.world_size,
        limit=limit,
        cache=Cache.of(config),
    ):
        run.poll_together()
        yield batch


def dry_run_text(config: FitConfig, manifest: Manifest, samples: str, model: str) -> str:
    """Sizes and steps; `samples`: what the data set has; `model`: a line on the model."""
    return (
        f"\ndata: {manifest.num_samples:,} {samples} in {len(manifest.shards)} shards, {len(manifest.classes)} classes"
        f"\nmodel: {model}"
        f"\nsteps: {-(-config.total_images // config.global_batch):,} of {config.global_batch} images"
        f" ({config.total_images / manifest.num_samples:.1f} epochs)"
    )
