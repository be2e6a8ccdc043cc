"""Folders on disk, fingerprints, and weights from (seed, name)."""

import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from vqscale import sources
from vqscale.models.init import initialise
from vqscale.models.pretrained import (
    fingerprint,
    load_into,
    read_folder,
    save_pretrained,
    write_folder,
)
from vqscale.models.quantizer import QuantizerConfig
from vqscale.models.vqvae import VQVAE, VQVAEConfig

CONFIG = {"hidden": 8, "residual_hidden": 4, "residual_layers": 1}


def build(config_json: dict) -> VQVAE:
    config = VQVAEConfig(quantizer=QuantizerConfig(num_codes=8, code_dim=4), **config_json["config"])
    return VQVAE(config, resolution=config_json["resolution"])


def vqvae(seed: int = 0) -> VQVAE:
    model = build({"config": CONFIG, "resolution": 16})
    initialise(model, seed)
    return model


def save(folder, model: nn.Module) -> str:
    return save_pretrained(folder, model, kind="vqvae", config=CONFIG, extra={"resolution": 16, "date": "2019-06-02"})


# ---- folders


def test_a_saved_model_comes_back_exactly_with_its_config(tmp_path):
    model = vqvae()
    stated = save(tmp_path / "a" / "b", model)
    tensors, config = read_folder(tmp_path / "a" / "b")
    loaded = build(config)
    load_into(loaded, tensors, tmp_path)
    assert config == {"kind": "vqvae", "config": CONFIG, "fingerprint": stated, "resolution": 16, "date": "2019-06-02"}
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    image = torch.zeros(1, 3, 16, 16)
    assert torch.equal(loaded.eval()(image).reconstruction, model.eval()(image).reconstruction)
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["config.json", "model.safetensors"]


def test_the_bytes_depend_on_the_weights_only(tmp_path):
    model = vqvae()
    save(tmp_path / "one", model)
    tensors = {name: value.to(memory_format=torch.channels_last) if value.dim() == 4 else value
               for name, value in reversed(model.state_dict().items())}  # fmt: skip
    write_folder(tmp_path / "two", tensors, {"other": "json"})
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    save(tmp_path / "three", vqvae(seed=1))
    assert (tmp_path / "one/model.safetensors").read_bytes() != (tmp_path / "three/model.safetensors").read_bytes()


def test_anyone_can_open_it(tmp_path):
    save(tmp_path, vqvae())
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert tensors["levels.0.quantizer.embedding"].shape == (8, 4)
    assert json.loads((tmp_path / "config.json").read_text())["kind"] == "vqvae"


def test_tied_tensors_can_be_written(tmp_path):
    shared = torch.arange(6.0)
    write_folder(tmp_path, {"a": shared, "b": shared, "c": shared[:2]}, {})
    tensors, _ = read_folder(tmp_path)
    assert torch.equal(tensors["b"], shared) and torch.equal(tensors["c"], shared[:2])


def test_a_failed_write_leaves_the_old_files_whole(tmp_path, monkeypatch):
    save(tmp_path, vqvae())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TypeError):
        write_folder(tmp_path, vqvae(seed=1).state_dict(), {"not json": object()})

    def disk_full(tensors: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", disk_full)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, vqvae(seed=1))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_missing_and_broken_files_are_one_clear_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        read_folder(tmp_path / "none")
    save(tmp_path, vqvae())
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match="model.safetensors: not a whole safetensors file"):
        read_folder(tmp_path)
    flipped = bytearray(whole)
    flipped[-40] ^= 1
    weights.write_bytes(flipped)
    with pytest.raises(ValueError, match="its fingerprint is sha256:.*config.json states sha256:"):
        read_folder(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors does not exist"):
        read_folder(tmp_path)
    config.write_text("[1]")
    weights.write_bytes(whole)
    with pytest.raises(ValueError, match="expected an object, found a list"):
        read_folder(tmp_path)
    config.write_text("{")
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        read_folder(tmp_path)


def test_a_pickle_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a file of weights ran code",))

    save(tmp_path, vqvae())
    torch.save({"weight": Bomb()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_folder(tmp_path)


def test_an_unknown_kind_names_the_known_ones():
    with pytest.raises(ValueError, match="description of a gan model: the kinds are vqvae, prior and classifier"):
        sources.build({"kind": "gan"})


def test_loading_is_strict_and_changes_nothing_on_error():
    model, tensors = vqvae(), vqvae(seed=1).state_dict()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    name = "levels.1.to_code.weight"
    for change, match in [
        ({name: None}, rf"FILE: {name} is missing \(1 of the model's {len(before)} tensors"),
        ({"zz": torch.zeros(1)}, "FILE: zz is not in the model"),
        ({name: torch.zeros(4, 8, 1, 1)}, rf"FILE: {name} has shape \[4, 8, 1, 1\], the model needs \[4, 12, 1, 1\]"),
        ({name: torch.zeros(4, 12, 1, 1, dtype=torch.int32)}, f"FILE: {name} is torch.int32.*torch.float32"),
    ]:
        changed = {key: value for key, value in (tensors | change).items() if value is not None}
        with pytest.raises(ValueError, match=match):
            load_into(model, changed, "FILE")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    load_into(model, tensors, "FILE")
    assert torch.equal(model.state_dict()[name], tensors[name])


# ---- fingerprint


def test_fingerprint_has_a_known_value():
    import hashlib

    tensors = {"b": torch.tensor([[1.0, 2.0]]), "a": torch.tensor(3, dtype=torch.int64)}
    text = b"a\0int64\0[]\0" + (3).to_bytes(8, "little") + b"b\0float32\0[1, 2]\0" + bytes.fromhex("0000803f00000040")
    assert fingerprint(tensors) == "sha256:" + hashlib.sha256(text).hexdigest()
    assert fingerprint({"x": torch.tensor([1.0], dtype=torch.bfloat16)}).startswith("sha256:")


def test_fingerprint_sees_every_weight_and_codebook_and_no_learning_state():
    model = vqvae()
    name = fingerprint(model.state_dict())
    for key, value in model.state_dict().items():
        old = value.clone()
        value.view(-1)[-1] += 1
        ignored = key.endswith((".cluster_size", ".embedding_sum", ".updates"))
        assert (fingerprint(model.state_dict()) == name) == ignored, key
        value.copy_(old)
    assert fingerprint(model.to(memory_format=torch.channels_last).state_dict()) == name
    gradient = VQVAE(VQVAEConfig(quantizer=QuantizerConfig(num_codes=8, code_dim=4, codebook="gradient"), **CONFIG),
                     resolution=16)  # fmt: skip
    initialise(gradient, 0)
    before = fingerprint(gradient.state_dict())
    for buffer in ("adam_mean", "adam_square", "updates"):
        getattr(gradient.levels[0].quantizer, buffer).add_(1)
    assert fingerprint(gradient.state_dict()) == before
    assert fingerprint({"a": torch.zeros(2, 3)}) != fingerprint({"a": torch.zeros(3, 2)})
    assert fingerprint({"a": torch.zeros(2)}) != fingerprint({"b": torch.zeros(2)})


# ---- weights from (seed, name)


def materialised_from_meta(seed: int) -> VQVAE:
    with torch.device("meta"):
        model = build({"config": CONFIG, "resolution": 16})
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(math.nan)
    initialise(model, seed)
    return model


def test_meta_and_cpu_models_get_the_same_weights_and_buffers():
    one, other = vqvae(), materialised_from_meta(0)
    for (name, a), (_, b) in zip([*one.named_parameters(), *one.named_buffers()],
                                 [*other.named_parameters(), *other.named_buffers()], strict=True):  # fmt: skip
        assert torch.equal(a, b), name
    assert not torch.equal(next(vqvae(seed=1).parameters()), next(one.parameters()))


def test_the_global_generator_plays_no_part():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = vqvae()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    initialise(model, 0)
    assert torch.equal(before, state) and torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(next(vqvae().parameters()), next(model.parameters()))


def test_a_tensor_depends_on_its_own_name_alone():
    small = nn.ModuleDict({"b": nn.Linear(3, 4)})
    large = nn.ModuleDict({"a": nn.Linear(7, 2), "b": nn.Linear(3, 4)})
    for model in (small, large):
        initialise(model, 0)
    assert torch.equal(small["b"].weight, large["b"].weight)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.empty(3), persistent=False)

    def init_buffers(self, generator: torch.Generator) -> None:
        self.mask.copy_(torch.tensor([1.0, 0, 1]))


def test_rules_by_module():
    quiet = nn.Conv2d(4, 8, 3)
    quiet.init_scale = 0.0
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(400, 300),
            "conv": nn.Conv2d(64, 128, 3),
            "up": nn.ConvTranspose2d(256, 64, 4, stride=2),
            "grouped": nn.Conv1d(64, 512, 5, groups=4),
            "embedding": nn.Embedding(200, 64),
            "norm": nn.LayerNorm(5),
            "group": nn.GroupNorm(1, 4),
            "attention": nn.MultiheadAttention(64, 4),
            "quiet": quiet,
            "masked": Masked(),
        }
    )
    model["tied"] = nn.Linear(400, 300)
    model["tied"].weight = model["linear"].weight
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.fill_(math.nan)
    initialise(model, 0)
    assert all(p.isfinite().all() for p in model.parameters())
    fan_in = {"linear": 400, "conv": 64 * 9, "up": 256 * 4, "grouped": 16 * 5}
    for name, fan in fan_in.items():
        assert model[name].weight.std().item() == pytest.approx(fan**-0.5, rel=0.03)
        assert model[name].bias.abs().max() == 0
    assert model["embedding"].weight.std().item() == pytest.approx(1, rel=0.03)
    assert model["attention"].in_proj_weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert model["norm"].weight.tolist() == [1] * 5 and model["group"].bias.tolist() == [0] * 4
    assert quiet.weight.abs().max() == 0
    assert model["masked"].mask.tolist() == [1, 0, 1]
    lone = nn.Module()
    lone.gain = nn.Parameter(torch.zeros(3))
    with pytest.raises(TypeError, match=r"no rule for parameter gain \(3,\) of Module"):
        initialise(lone, 0)


def test_signals_keep_their_size_through_relu_layers():
    layers = [nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular") for _ in range(6)]
    for layer in layers:
        layer.init_scale = math.sqrt(2)
    model = nn.Sequential(*(part for layer in layers for part in (nn.ReLU(), layer)))
    initialise(model, 0)
    x = torch.randn(4, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    assert 0.5 < model(x).std() < 2


@pytest.fixture
def four_ranks():
    dist.init_process_group("fake", rank=2, world_size=4, store=FakeStore())
    yield init_device_mesh("cpu", (4,))
    dist.destroy_process_group()


def test_a_rank_keeps_its_part_of_the_whole_draw(four_ranks):
    whole, sharded = nn.Linear(6, 10), nn.Linear(6, 10)
    for name, parameter in list(sharded.named_parameters()):
        empty = distribute_tensor(torch.zeros_like(parameter), four_ranks, [Shard(0)], src_data_rank=None)
        setattr(sharded, name, nn.Parameter(empty))
    initialise(whole, 0)
    initialise(sharded, 0)
    assert isinstance(sharded.weight, DTensor)
    assert torch.equal(sharded.weight.to_local(), whole.weight[6:9])  # 10 rows on 4 ranks: 3, 3, 3, 1
