import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_ranks
from support.training import WIDTH, MemoryLoader, TinyConfig, TinyModel, losses, sample, train, whole
from support.vqvaes import vqvae
from torch import Tensor, nn

from vqscale.config import StageConfig
from vqscale.engine.parallel import TorchEngine, assert_same_everywhere, autocast, compile_units, make_engine
from vqscale.models.init import initialise
from vqscale.models.quantizer import QuantizerConfig
from vqscale.models.vqvae import VQVAE, VQVAEConfig
from vqscale.topology import Topology, bring_up, take_down

STEPS = 20
OPTIMIZER = {"betas": (0.9, 0.999), "weight_decay": 0.01}


def config(run_dir: Path | str, **changes: Any) -> TinyConfig:
    base = TinyConfig(run_dir=str(run_dir), total_images=8 * STEPS, max_norm=0.5, weight_decay=0.01)
    return replace(base, **{"trackers": [], **changes})


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The single process that every strategy must equal, in fp32 and fp64."""
    found = {}
    for precision in ("fp32", "fp64"):
        run_dir = tmp_path_factory.mktemp(precision)
        (result,) = run_ranks(train, 1, config(run_dir, precision=precision))
        found[precision] = result | {"losses": losses(run_dir)}
        assert len(losses(run_dir)) == STEPS and result["engine"] == "TinyModel"
    return found


@pytest.mark.parametrize(
    ("strategy", "world", "micro", "precision"),
    [
        ("single", 1, 2, "fp32"),
        ("ddp", 2, 0, "fp32"),
        ("ddp", 2, 2, "fp32"),
        ("ddp", 2, 2, "fp64"),
        ("fsdp", 2, 0, "fp32"),
        ("fsdp", 2, 2, "fp32"),
        ("fsdp", 2, 2, "fp64"),
        ("hsdp", 4, 1, "fp32"),
        ("zero1", 2, 2, "fp32"),
        ("zero2", 2, 0, "fp32"),
        pytest.param("zero2", 4, 1, "fp32", marks=pytest.mark.slow),
        ("zero3", 2, 2, "fp32"),
    ],
)
def test_strategies_equal_a_single_process(
    tmp_path: Path, alone: dict[str, Any], strategy: str, world: int, micro: int, precision: str
) -> None:
    asked = config(tmp_path, strategy=strategy, micro_batch=micro, precision=precision)
    ranks = run_ranks(train, world, asked)
    expected = alone[precision]
    tolerance = 1e-9 if precision == "fp64" else 1e-5
    ours = losses(tmp_path)
    assert ours.keys() == expected["losses"].keys()
    assert max(abs(ours[seen] - loss) for seen, loss in expected["losses"].items()) < tolerance
    for name, tensor in expected["tensors"].items():
        torch.testing.assert_close(ranks[0]["tensors"][name], tensor, rtol=0, atol=tolerance, msg=name)
        assert all(torch.equal(rank["tensors"][name], ranks[0]["tensors"][name]) for rank in ranks), name
    positions = sorted(position for rank in ranks for position in rank["consumed"])
    assert positions == list(range(8 * STEPS))
    wrapped = {"single": "TinyModel", "ddp": "DistributedDataParallel"}.get(
        strategy, "DeepSpeedEngine" if strategy.startswith("zero") else "FSDPTinyModel"
    )
    assert {rank["engine"] for rank in ranks} == {wrapped}


def test_clipping_was_active(alone: dict[str, Any], tmp_path: Path) -> None:
    run_ranks(train, 1, config(tmp_path, max_norm=0.0))
    assert abs(losses(tmp_path)[8 * STEPS] - alone["fp32"]["losses"][8 * STEPS]) > 1e-3


def _with_engine(strategy: str) -> dict[str, Any]:
    """Facts about an engine, from the inside of its rank."""
    topology = bring_up(StageConfig(device="cpu", threads=1, strategy=strategy))
    module = TinyModel()
    engine = TorchEngine(module, topology, precision="fp32", accumulation=1, optimizer=OPTIMIZER)
    x = torch.stack([sample(p, 0) for p in range(4)])
    model = module if strategy == "single" else engine.model
    features = getattr(model, "module", model).features(x)
    local = engine.local_weights()
    laid_out = engine.as_checkpoint_tensors({name: tensor * 2 for name, tensor in local.items()})
    doubled = {name: torch.equal(whole(laid_out[f"ema.{name}"]), 2 * whole(p)) for name, p in module.named_parameters()}
    facts = {
        "bytes": engine.bytes_on_this_rank(),
        "features": features.detach(),
        "doubled": all(doubled.values()),
        "names": sorted(engine.as_checkpoint_tensors({})),
        "local": sorted(local),
        "buffer": module.average.dtype,
    }
    engine.optimizer_steps = 41
    facts["steps"] = engine.optimizer_steps
    take_down(orderly=True)
    return facts


def test_what_each_rank_holds() -> None:
    facts = {
        "single": run_ranks(_with_engine, 1, "single"),
        "ddp": run_ranks(_with_engine, 2, "ddp"),
        "fsdp": run_ranks(_with_engine, 2, "fsdp"),
    }
    whole_model = sum(p.numel() for p in TinyModel().parameters()) * 4
    for strategy, share in (("single", 1.0), ("ddp", 1.0), ("fsdp", 0.5)):
        held = [rank["bytes"] for rank in facts[strategy]]
        total = sum(rank["parameters"] for rank in held)
        assert total == whole_model * len(held) * share
        assert all(rank["optimizer"] == 2 * rank["parameters"] for rank in held)
    (plain,) = facts["single"]
    for ranks in facts.values():
        for rank in ranks:
            torch.testing.assert_close(rank["features"], plain["features"])
            assert rank["doubled"] and rank["names"] == plain["names"] and rank["local"] == plain["local"]
            assert rank["buffer"] == torch.float32 and rank["steps"] == 41


def _from_meta(strategy: str, forgets: bool) -> bool:
    """Whether a model built on the meta device has only NaN, or the values of one that was built whole."""
    topology = bring_up(StageConfig(device="cpu", threads=1, strategy=strategy))
    expected = initialised(TinyModel())
    with torch.device("meta"):
        module = TinyModel()
    settings = TinyConfig(strategy=strategy)
    make_engine(module, topology, settings, 1, initialise=(lambda _: None) if forgets else initialised)
    values = {name: whole(parameter.detach()) for name, parameter in module.named_parameters()}
    take_down(orderly=True)
    if forgets:
        return all(value.isnan().all() for value in values.values())
    return all(torch.equal(values[name], parameter) for name, parameter in expected.named_parameters())


def initialised(module: torch.nn.Module) -> torch.nn.Module:
    initialise(module, seed=3)
    return module


@pytest.mark.parametrize("forgets", [False, True])
@pytest.mark.parametrize(("strategy", "world"), [("single", 1), ("ddp", 2), ("fsdp", 2)])
def test_a_model_on_the_meta_device_gets_its_values_after_it_is_spread(
    strategy: str, world: int, forgets: bool
) -> None:
    assert run_ranks(_from_meta, world, strategy, forgets) == [True] * world


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(topology: Topology) -> None:
    engine = TorchEngine(TinyModel(), topology, precision="fp32", accumulation=1, optimizer=OPTIMIZER)
    x = torch.ones(2, WIDTH)
    for loss_scale, expected in ((1.0, True), (float("inf"), False), (float("nan"), False), (1.0, True)):
        before = {name: tensor.clone() for name, tensor in engine.as_checkpoint_tensors({}).items()}
        steps = engine.optimizer_steps
        engine.begin_micro_batch(last=True)
        engine.backward(engine.model(x).square().sum() * loss_scale)
        applied, norm = engine.step(0.1, 1.0)
        assert (applied, bool(norm.isfinite())) == (expected, expected)
        changed = [
            name for name, tensor in engine.as_checkpoint_tensors({}).items() if not torch.equal(tensor, before[name])
        ]
        assert bool(changed) == expected
        assert engine.optimizer_steps == steps + expected
        assert all(p.grad is None for p in engine.module.parameters())


def test_gradients_are_the_mean_over_micro_batches(topology: Topology) -> None:
    norms = []
    for parts in (1, 4):
        engine = TorchEngine(TinyModel(), topology, precision="fp64", accumulation=parts, optimizer=OPTIMIZER)
        for batch in torch.stack([sample(p, 0) for p in range(8)]).double().chunk(parts):
            engine.backward(engine.model(batch).square().mean())
        norms.append(engine.step(0.0, 0.0)[1].item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)


@pytest.mark.parametrize(
    ("precision", "parameters", "arithmetic"),
    [
        ("fp32", torch.float32, torch.float32),
        ("fp64", torch.float64, torch.float64),
        ("bf16", torch.float32, torch.bfloat16),
    ],
)
def test_precisions(topology: Topology, precision: str, parameters: torch.dtype, arithmetic: torch.dtype) -> None:
    engine = TorchEngine(TinyModel(), topology, precision=precision, accumulation=1, optimizer=OPTIMIZER)
    assert {p.dtype for p in engine.module.parameters()} == {parameters}
    with autocast(topology, precision):
        assert engine.model.head(torch.ones(2, WIDTH, dtype=parameters)).dtype == arithmetic


def test_what_cannot_be_had_is_refused(topology: Topology) -> None:
    with pytest.raises(ValueError, match="precision=fp16: choose fp32, tf32, bf16, fp64"):
        TorchEngine(TinyModel(), topology, precision="fp16", accumulation=1, optimizer=OPTIMIZER)


def _compare(values: list[float]) -> str:
    topology = bring_up(StageConfig(device="cpu", threads=1))
    try:
        assert_same_everywhere({"fixed": torch.ones(2), "code": torch.tensor([values[topology.rank]])}, topology)
        return ""
    except RuntimeError as error:
        return str(error)
    finally:
        take_down(orderly=True)


def test_what_differs_between_ranks_is_named() -> None:
    assert run_ranks(_compare, 2, [1.0, 1.0]) == ["", ""]
    assert run_ranks(_compare, 2, [1.0, 1.0000001]) == ["code differs between ranks"] * 2


def _train_compiled_or_not(compiled: bool) -> dict[str, torch.Tensor]:
    topology = bring_up(StageConfig(device="cpu", threads=1))
    module = TinyModel()
    names = [name for name, _ in module.named_parameters()]
    if compiled:
        compile_units(module)
    engine = TorchEngine(module, topology, precision="fp32", accumulation=1, optimizer=OPTIMIZER)
    assert [name for name, _ in module.named_parameters()] == names
    for first in range(0, 12, 4):
        engine.backward(engine.model(torch.stack([sample(p, 0) for p in range(first, first + 4)])).square().mean())
        engine.step(0.01, 1.0)
    if compiled:
        assert sum(torch._dynamo.utils.counters["stats"].values()) > 0, "nothing was compiled"
    return {name: whole(tensor) for name, tensor in engine.as_checkpoint_tensors({}).items()}


@pytest.mark.parametrize(
    "strategy, method", [("single", "compiled_units"), ("ddp", "compiled_units"), ("fsdp", "wrap_units")]
)
def test_units_that_are_sharded_on_their_own_are_compiled_on_their_own(
    monkeypatch: pytest.MonkeyPatch, strategy: str, method: str
) -> None:
    module, compiled = vqvae(), list[torch.nn.Module]()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda unit: compiled.append(unit))
    compile_units(module, strategy)
    assert compiled == getattr(module, method)()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo looks
def test_every_unit_is_compiled_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three levels have nine units, in training and in evaluation, for batches of three sizes."""
    compile_unit = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda unit: compile_unit(unit, backend="eager"))
    quantizer = QuantizerConfig(num_codes=8, code_dim=4)
    config = VQVAEConfig(hidden=8, residual_hidden=4, downsample=[2, 2, 2], quantizer=quantizer)
    module = VQVAE(config, resolution=16)
    initialise(module, seed=0)
    torch.compiler.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8, accumulated_recompile_limit=8):
        compile_units(module)
        assert len(module.compiled_units()) == 9
        for batch in (2, 3, 1):
            images = torch.zeros(batch, 3, 16, 16)
            module.train()(images).reconstruction.sum().backward()
            with torch.no_grad():
                module.eval()(images)
    torch.compiler.reset()


@pytest.mark.slow
def test_compiled_units_equal_eager_ones() -> None:
    eager, compiled = (run_ranks(_train_compiled_or_not, 1, how, timeout=500)[0] for how in (False, True))
    for name, tensor in eager.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_the_memory_loader_of_these_tests_keeps_the_rules() -> None:
    """Every position once, whatever the ranks: the comparison above would mean nothing otherwise."""
    seen = []
    for rank in range(2):
        batches = iter(MemoryLoader(8, 2, rank, 2, 0, set()))
        seen += [p for _ in range(4) for p in next(batches)["position"].tolist()]
    assert sorted(seen) == list(range(16))


class Convolutions(nn.Module):
    """Kernels of 3x3 and of 1x1, as a residual block has them, and one of a single channel."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(3, 8, 3, padding=1)
        self.pointwise = nn.Conv2d(8, 4, 1)
        self.single = nn.Conv2d(4, 1, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.single(torch.relu(self.pointwise(torch.relu(self.spatial(image)))))


def _ddp_warnings(channels_last: bool) -> list[str]:
    """What two DDP steps warn of."""
    topology = bring_up(StageConfig(strategy="ddp", device="cpu", threads=1))
    torch.manual_seed(0)
    engine = TorchEngine(Convolutions(), topology, precision="fp32", accumulation=1, optimizer=OPTIMIZER)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    image = torch.randn(2, 3, 8, 8).to(memory_format=layout)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            engine.begin_micro_batch(last=True)
            with autocast(topology, "bf16"):
                loss = engine.model(image).square().mean()
            engine.backward(loss)
            engine.step(1e-2, 1.0)
    take_down(orderly=True)
    assert all(p.is_contiguous() for p in engine.module.parameters())
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("channels_last", [True, False])
def test_ddp_takes_gradients_as_they_are(channels_last: bool) -> None:
    """It warns of a copy where a gradient's strides are not its bucket's, those of dimensions of size 1 included."""
    for warned in run_ranks(_ddp_warnings, 2, channels_last):
        assert [line for line in warned if "strides" in line] == []
