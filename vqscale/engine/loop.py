"""fit: one training loop for every model, data set and strategy.

In: an engine, a loader, a step function.  Out: a trained model in checkpoints, metrics.jsonl, and a run that continues
bit for bit when the same command runs again.  The clock is images seen.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vqscale.batch import Batch, to_device
from vqscale.config import ReadsShards, fingerprint, flatten
from vqscale.engine.checkpoint import Checkpoint, Checkpointer, CheckpointState, has_checkpoint
from vqscale.engine.ema import WeightEMA
from vqscale.engine.metric_log import MetricLog, drop_lines_beyond
from vqscale.engine.optim import learning_rate_at
from vqscale.engine.pace import OwnWork
from vqscale.engine.parallel import Engine, autocast
from vqscale.engine.skipped import SkippedSteps
from vqscale.engine.tensors import Tensors, first_not_finite
from vqscale.engine.throughput import ComputeRate, StepTrace, device_name
from vqscale.fields import Choice, Fraction, NonNegativeFloat, NonNegativeInt, PathText, PositiveInt, Range
from vqscale.files import read_jsonl
from vqscale.runtime import Run
from vqscale.stopping import Agreement, Leave
from vqscale.topology import Topology

log = logging.getLogger("vqscale")
_SAVE = "save by time"  # what rank 0 tells the others
_TAIL_BYTES = 1 << 16
_NOT_COMPARED = "transform"  # in a description: tars of the same images may not say how they were prepared
Tracker = Annotated[
    str,
    Choice("tensorboard", "wandb", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio"),
]
StepFn = Callable[[Any, Batch], tuple[Tensor, Mapping[str, Tensor]]]
AfterStep = Callable[..., Mapping[str, Tensor]]  # (applied=, learning_rate=, images_seen=) -> metrics
Evaluate = Callable[[nn.Module, int], Iterable[tuple[str, float]]]  # (model, images seen) -> held-out figures by name


@dataclass(frozen=True)
class FitConfig(ReadsShards):
    """What every trainer has. Every `…_every` and `total_images` counts images; 0 turns a cadence off."""

    outputs: ClassVar[tuple[str, ...]] = ("checkpoints", "samples", "profile", "bad.jsonl")
    batch_key: ClassVar[str] = "micro_batch"
    # They change what is learned from here on, but every saved state still fits: people change them on purpose.
    knobs: ClassVar[frozenset[str]] = frozenset(
        "learning_rate warmup_images schedule final_learning_rate beta1 beta2 weight_decay max_norm ema_halflife "
        "ema_rampup precision deterministic compile".split()
    )

    init: PathText = ""  # a run or an exported folder whose weights a new run starts from; "" = random weights
    init_ignore: list[str] = field(default_factory=list)  # tensors that are not taken from it: how their names begin
    total_images: PositiveInt = 100_000  # train until this many images were seen
    global_batch: PositiveInt = 64  # images per optimizer step, over all ranks
    micro_batch: NonNegativeInt = 0  # the most images a rank holds at once; 0 = no limit
    # tf32: fp32 with TF32 products, on a GPU; bf16: autocast, fp32 weights; fp64: debugging
    precision: Annotated[str, Choice("fp32", "tf32", "bf16", "fp64")] = "fp32"
    deterministic: bool = False  # the same bits again after a resume also on a GPU, which is slower
    learning_rate: NonNegativeFloat = 3e-4  # peak
    warmup_images: NonNegativeInt = 0  # linear warm-up
    schedule: Annotated[str, Choice("constant", "cosine")] = "constant"  # of the learning rate
    final_learning_rate: Fraction = 0.0  # end of the cosine, as a share of the peak
    beta1: Annotated[float, Range(ge=0, lt=1)] = 0.9  # AdamW
    beta2: Annotated[float, Range(ge=0, lt=1)] = 0.999  # AdamW
    weight_decay: NonNegativeFloat = 0.0  # AdamW, on matrices and kernels only
    max_norm: NonNegativeFloat = 1.0  # clip the global gradient norm; 0 = off
    ema_halflife: NonNegativeInt = 0  # half-life of the weight EMA in images; 0 = no EMA
    ema_rampup: NonNegativeFloat = 0.05  # the half-life is at most this share of images seen
    compile: bool = False  # torch.compile the model's units
    max_skipped_steps: NonNegativeInt = 10  # end the run after this many steps in a row without a finite gradient
    log_every: NonNegativeInt = 6_400  # metrics.jsonl and trackers
    save_every: NonNegativeInt = 64_000  # checkpoints
    save_minutes: NonNegativeFloat = 0.0  # one more checkpoint after so long without any; 0 = off
    evaluate_every: NonNegativeInt = 0  # held-out evaluation
    keep_checkpoints: PositiveInt = 2  # the newest ones; older are removed once a newer one is committed
    workers: NonNegativeInt = 1  # loader processes per rank
    shuffle_window: PositiveInt = 64  # shards that are mixed at a time
    profile_at: NonNegativeInt = 0  # trace a few steps from so many images on, into profile/; 0 = no trace
    peak_tflops: NonNegativeFloat = 0.0  # a device's peak at this precision, for mfu; 0 = from a table of devices
    max_bad_fraction: Fraction = 0.01  # unreadable samples tolerated, as a share of those consumed
    trackers: list[Tracker] = field(default_factory=lambda: ["tensorboard"])  # those of accelerate


class Loader(Protocol):
    """An endless stream of equal micro-batches whose position is one integer."""

    micro_batches_per_step: int

    @property
    def bad_kinds(self) -> Sequence[str]: ...
    def __iter__(self) -> Iterator[Batch]: ...
    def sample_at(self, position: int) -> Mapping[str, Any]: ...
    def advance(self) -> None: ...
    def count_bad(self, counts: Mapping[str, int]) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def fit(
    engine: Engine,
    loader: Loader,
    step_fn: StepFn,
    *,
    config: FitConfig,
    run: Run,
    description: Mapping[str, Any],
    after_step: AfterStep | None = None,
    evaluate: Evaluate | None = None,
    flops_per_image: int = 0,
) -> None:
    """Train until `config.total_images`, from the newest checkpoint of `run.run_dir` if there is one.

    `step_fn(model, batch) -> (loss, metrics)`: means over the micro-batch, as tensors. `after_step(applied,
    learning_rate, images_seen) -> metrics`: called on all ranks after every optimizer step. `evaluate(model,
    images_seen)`: called on all ranks, with the plain model in eval mode, each `evaluate_every` images and at the end.
    When the run is asked to stop it may raise stopping.Leave, on all ranks alike; it is called again when the run goes
    on. `description`: all that is needed to build the model, as plain JSON; saved in every checkpoint, and a checkpoint
    of another model is refused. `flops_per_image`: of a training step, for `tflops_per_second` and `mfu`; 0 = unknown.
    Raises stopping.Stopped after saving when the run was asked to stop; ValueError when a checkpoint does not fit or is
    gone, a tensor is not finite, or too many steps in a row had no finite gradient.
    """
    resumes(run)
    topology, batch_size, accumulation = run.topology, config.global_batch, loader.micro_batches_per_step
    ema, averages = None, {}
    if config.ema_halflife:
        ema = WeightEMA(engine.local_weights(), halflife=config.ema_halflife, rampup=config.ema_rampup)
        averages = ema.averages
    checkpoints = Checkpointer(run.run_dir / "checkpoints", topology, keep=config.keep_checkpoints)
    run.at_exit.callback(checkpoints.settle)
    latest = checkpoints.latest()
    state = latest.state if latest else CheckpointState(images_seen=0, data={})
    seen, owed = state.images_seen, state.evaluation_owed and not run.was_done
    skipped = SkippedSteps(config.max_skipped_steps, loader.sample_at, topology, state.skipped_steps, seen)
    if latest:
        _refuse_other_model(latest, description)
        engine.from_checkpoint_tensors(lambda tensors: _load(latest, tensors, topology), averages)
        engine.optimizer_steps = state.optimizer_steps
        loader.load_state_dict(dict(state.data))
        verb = "resuming at" if seen < config.total_images else "nothing left to do: already trained on"
        log.info("%s %s of %s images", verb, f"{seen:,}", f"{config.total_images:,}")
    _warn_of_schedule(config, seen, state.total_images)
    run.images_seen = resumed_from = seen
    run.record_facts(resumed_from=seen, precision=config.precision, bytes_per_rank=_bytes_per_rank(engine, run))
    run.record_facts(device_name=device_name(topology.device), flops_per_image=flops_per_image)
    compute = ComputeRate(flops_per_image, topology, config.precision, config.peak_tflops)
    if topology.is_main:
        drop_lines_beyond(run.run_dir / "metrics.jsonl", seen)
    metrics = MetricLog(run.run_dir / "metrics.jsonl", topology, run.start_trackers(config.trackers, seen))
    agreement, clock, stop, save_later = Agreement(topology, [*loader.bad_kinds, _SAVE]), _Clock(), False, False
    own_work = OwnWork(engine.module, topology, micro_batches=accumulation)
    save_seconds, saved_at = 60 * config.save_minutes or math.inf, time.monotonic()
    batches = _on_device(iter(loader) if seen < config.total_images else iter(()), topology.device)
    run.at_exit.callback(batches.close)
    bar = tqdm(total=config.total_images, initial=seen, unit="img", disable=not topology.is_main, desc=run.stage)
    run.at_exit.callback(bar.close)
    trace = StepTrace(run.run_dir / "profile", topology, config.profile_at, seen)
    run.at_exit.callback(trace.close)

    def evaluated() -> bool:
        """Write the figures that are due now; False when the run was asked to stop meanwhile."""
        every = config.evaluate_every
        due = every and (seen >= config.total_images or _due(every, seen, batch_size))
        figures = _evaluate(engine, run, config.precision, averages, evaluate) if due and evaluate else {}
        if figures:
            metrics.write(seen, figures)
        return figures is not None

    if owed:
        owed = stop = not evaluated()
    while seen < config.total_images and not stop:
        engine.module.train()
        trace.before_step(seen)
        counts = torch.zeros(len(loader.bad_kinds) + 1, dtype=torch.int64)
        losses = []
        for index in range(accumulation):
            with clock.waiting_for_data():
                batch = next(batches)
            counts[:-1] += torch.bincount(batch["bad"].cpu(), minlength=len(counts))[1:]
            engine.begin_micro_batch(last=index == accumulation - 1)
            with autocast(topology, config.precision), own_work.forward():
                loss, values = step_fn(engine.model, batch)
            engine.backward(loss)
            losses.append((loss.detach(), batch["position"]))
            metrics.add({"loss": loss, **values}, micro_batches=accumulation)
        learning_rate = _learning_rate(config, seen)
        applied, norm = engine.step(learning_rate, config.max_norm)
        if applied:
            checkpoints.confirm()
        seen = run.images_seen = seen + batch_size
        skipped.count(applied, losses, seen, learning_rate)
        step = {"applied": applied, "learning_rate": learning_rate, "images_seen": seen}
        metrics.add({"gradient_norm": norm, **(after_step(**step) if after_step else {})})
        if applied and ema:
            ema.update(seen, batch_size)
        loader.advance()
        counts[-1] = topology.is_main and time.monotonic() - saved_at >= save_seconds
        stop, counted = agreement.exchange(bool(run.stop_requested()), counts)
        save_later |= counted.pop(_SAVE, 0) > 0 or _due(config.save_every, seen, batch_size)
        stop = stop and applied  # a skipped step may follow from weights that should not be saved: a few more will tell
        loader.count_bad(counted)
        clock.count_step(batch_size)
        bar.update(batch_size)

        saving = seen >= config.total_images or stop or (save_later and applied)  # else after the next applied step
        evaluating = _due(config.evaluate_every, seen, batch_size)
        if saving or evaluating or _due(config.log_every, seen, batch_size):
            own_seconds, steps = own_work.seconds_per_step(clock.data_wait_seconds), clock.steps
            figures = {"learning_rate": learning_rate, **compute.extend(clock.take())}
            line = metrics.flush(seen, steps, figures, own_seconds)
            bar.set_postfix(loss=f"{line['loss']:.4f}")
            run.write_status("running")
        try:
            if saving or evaluating or skipped.in_a_row == 1:
                tensors = engine.as_checkpoint_tensors(averages)
                skipped.refuse_not_finite(tensors, seen)
            skipped.check(seen)
        except ValueError:  # the save in flight is of weights that nothing goes on from
            checkpoints.discard()
            raise
        owed = not evaluated()
        stop = stop or owed
        if saving or owed:
            late, counted = agreement.collect()
            stop, save_later = stop or late, False
            counted.pop(_SAVE, 0)
            loader.count_bad(counted)
            state = CheckpointState(
                images_seen=seen,
                data=loader.state_dict(),
                optimizer_steps=engine.optimizer_steps,
                skipped_steps=skipped.total,
                world_size=topology.world_size,
                strategy=topology.strategy,
                config=fingerprint(config),
                model=description,
                evaluation_owed=owed,
                total_images=config.total_images,
            )
            checkpoints.save(tensors, state)
            saved_at = time.monotonic()
    bar.close()
    checkpoints.wait()
    if seen < config.total_images or owed:
        run.stop(f"asked to, after {seen - resumed_from:,} images, at {seen:,} of {config.total_images:,}")


def resumes(run: Run) -> bool:
    """Whether there are checkpoints to go on from (damaged ones count). Collective.

    Raises ValueError, on all ranks, where they are gone: the run would start again from zero.
    """
    return run.topology.on_main(lambda: _saved_before(run))


def _saved_before(run: Run) -> bool:
    folder, seen = run.run_dir / "checkpoints", _images_seen_before(run)
    if has_checkpoint(folder):
        return True
    # The folder is made before the first step; a run that was killed before its first save leaves it empty.
    if seen and (not folder.is_dir() or run.previous_status.get("state") in ("done", "stopped")):
        with contextlib.suppress(OSError):
            folder.rmdir()  # empty: so it is refused the next time too
        raise ValueError(
            f"{folder}: the checkpoints of this run are gone, which has seen {seen:,} images; not starting again "
            "from zero: bring them back, or say fresh=true, or choose another run_dir"
        )
    if seen:
        log.warning("starting from zero: the %s images seen before were never saved", f"{seen:,}")
    return False


def _images_seen_before(run: Run) -> int:
    lines = [*read_jsonl(run.run_dir / "metrics.jsonl", _TAIL_BYTES), run.previous_status]
    return max((n for line in lines if isinstance(n := line.get("images_seen"), int)), default=0)


def _load(latest: Checkpoint, tensors: Tensors, topology: Topology) -> None:
    latest.load_into(tensors, topology)
    if name := first_not_finite(tensors, topology):
        raise ValueError(f"{latest.folder}: {name} is not finite; remove this folder to go on from the one before")


def _warn_of_schedule(config: FitConfig, seen: int, total_before: int) -> None:
    total = config.total_images
    if config.warmup_images >= total:
        log.warning("warmup_images=%d: the run ends before, at total_images=%d", config.warmup_images, total)
    if config.schedule == "cosine" and total_before not in (0, total):
        rates = [_learning_rate(replace(config, total_images=images), seen) for images in (total_before, total)]
        log.warning(
            "schedule=cosine now ends at %d images instead of %d: the learning rate goes on at %g instead of %g",
            *(total, total_before, rates[1], rates[0]),
        )


def _refuse_other_model(latest: Checkpoint, description: Mapping[str, Any]) -> None:
    saved, now = dict(flatten(dict(latest.state.model))), dict(flatten(dict(description)))
    for key in sorted(saved):  # the run's config answers for keys that are newer than the checkpoint
        if saved[key] != now.get(key) and key.split(".")[0] != _NOT_COMPARED:
            raise ValueError(f"{latest.folder}: {key} is {saved.get(key)} in the checkpoint and {now.get(key)} now")


def _learning_rate(config: FitConfig, seen: int) -> float:
    return learning_rate_at(
        seen,
        peak=config.learning_rate,
        warmup=config.warmup_images,
        schedule=config.schedule,
        total=config.total_images,
        final=config.final_learning_rate,
    )


def _due(every: int, seen: int, batch_size: int) -> bool:
    """Whether a multiple of `every` lies in the step that ended at `seen`."""
    return every > 0 and seen // every > (seen - batch_size) // every


def _evaluate(
    engine: Engine, run: Run, precision: str, averages: Tensors, evaluate: Evaluate
) -> dict[str, float] | None:
    """Figures by name, of the model with the weight EMA if there is one, or None when the evaluation was left."""
    engine.module.eval()
    with contextlib.ExitStack() as stack, torch.no_grad():
        if averages:  # in place of the weights, which come back unchanged
            engine.exchange_weights(averages)
            stack.callback(engine.exchange_weights, averages)
        with contextlib.suppress(Leave), autocast(run.topology, precision):
            return dict(evaluate(engine.module, run.images_seen))
    return None


def _bytes_per_rank(engine: Engine, run: Run) -> dict[str, list[int]]:
    ranks = run.topology.gather(engine.bytes_on_this_rank())
    return {what: [rank[what] for rank in ranks] for what in ranks[0]}


def _on_device(batches: Iterator[Batch], device: torch.device) -> Generator[Batch, None, None]:
    """The batches on `device`; on a GPU the next one is copied while this one is worked on."""
    if device.type != "cuda":
        yield from batches if device.type == "cpu" else (to_device(batch, device) for batch in batches)
        return
    copies, ahead = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(copies):
            moved = to_device(batch, device, non_blocking=True)
        if ahead is not None:
            yield _received(*ahead)
        ahead = moved, copies.record_event()


def _received(batch: Batch, arrived: torch.cuda.Event) -> Batch:
    """For use on the current stream, which waits; its memory is another's only after that use."""
    stream = torch.cuda.current_stream()
    stream.wait_event(arrived)
    for tensor in batch.values():
        if isinstance(tensor, Tensor) and tensor.is_cuda:
            tensor.record_stream(stream)
    return batch


class _Clock:
    """Images per second, and the share of time spent waiting for data, since the last `take`."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._since, self._waited, self._images, self.steps = time.perf_counter(), 0.0, 0, 0

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def count_step(self, images: int) -> None:
        self._images += images
        self.steps += 1

    @property
    def data_wait_seconds(self) -> float:
        """Per step."""
        return self._waited / max(1, self.steps)

    def take(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._since
        figures = {"images_per_second": self._images / seconds, "data_wait_fraction": self._waited / seconds}
        if torch.cuda.is_available():
            figures["peak_gpu_bytes"] = float(torch.cuda.max_memory_allocated())
        self._restart()
        return figures
