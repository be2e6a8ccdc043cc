"""Checkpoints of the community's layout against an independent forward of that layout."""

from collections.abc import Mapping

import pytest
import torch
from support.port import CODES, DIM, HIDDEN, RESIDUAL, pictures, port_forward, port_state
from torch import Tensor

from vqscale.models.community import convert
from vqscale.models.pretrained import load_into, read_torch
from vqscale.models.vqvae import VQVAE


def ours(state: Mapping[str, Tensor], *, rectified_skip: bool = False, resolution: int = 64) -> VQVAE:
    config, tensors = convert(state, "FILE", rectified_skip=rectified_skip)
    model = VQVAE(config, resolution=resolution)
    load_into(model, tensors, "FILE")
    return model.eval()


@pytest.mark.parametrize("in_place", [False, True])
@torch.inference_mode()
def test_codes_are_equal_and_reconstructions_to_1e_5(in_place: bool) -> None:
    state, image = port_state(), pictures()
    codes, expected = port_forward(state, image, in_place=in_place)
    assert all(len(level.unique()) > 10 for level in codes), "codes that differ, or equality would show nothing"
    model = ours(state, rectified_skip=in_place)
    output = model(image)
    assert all(torch.equal(a, b) for a, b in zip(output.codes, codes, strict=True))
    torch.testing.assert_close(output.reconstruction, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.decode(codes), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1
    other = ours(state, rectified_skip=not in_place)(image).reconstruction
    assert (other - expected).abs().max() > 0.1, "the two kinds of skip are told apart"


def test_sizes_are_read_off_the_tensors_and_the_prefix_is_taken_away() -> None:
    state = {f"module.{name}": tensor for name, tensor in port_state(residual_layers=1).items()}
    config, tensors = convert(state, "FILE")
    assert (config.hidden, config.residual_hidden, config.residual_layers) == (HIDDEN, RESIDUAL, 1)
    assert (config.quantizer.num_codes, config.quantizer.code_dim, list(config.downsample)) == (CODES, DIM, [4, 2])
    load_into(VQVAE(config, resolution=64), tensors, "FILE")


def test_the_codebook_keeps_its_averages() -> None:
    state = port_state()
    quantizer, counts = ours(state).levels[0].quantizer, state["quantize_t.cluster_size"]
    torch.testing.assert_close(quantizer.embedding_sum / quantizer.cluster_size[:, None], quantizer.embedding)
    assert torch.equal(quantizer.embedding, state["quantize_t.embed"].t())
    assert torch.equal(quantizer.cluster_size[counts > 0], counts[counts > 0]) and (counts == 0).any()
    assert quantizer.cluster_size.min() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantize_b.embed": None}, "FILE: quantize_b.embed is missing"),
        ({"enc_b.blocks.5.conv.1.weight": None}, "FILE: enc_b.blocks.5.conv.1.weight is missing"),
        ({"dec.blocks.0.bias": None}, "FILE: levels.1.decoder.0.bias is missing"),
        ({"logits.weight": torch.zeros(1)}, "FILE: logits.weight is no tensor of a rosinality"),
        ({"dec.blocks.0.bias": torch.zeros(7)}, r"levels.1.decoder.0.bias has shape \[7\], the model needs \[128\]"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Tensor | None], message: str) -> None:
    state = {name: tensor for name, tensor in (port_state() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        ours(state)


def test_files_of_torch_save(tmp_path) -> None:
    path, state = tmp_path / "vqvae_560.pt", {"a": torch.arange(3.0)}
    for saved in (state, {"model": state, "epoch": 3}, {"state_dict": state}):
        torch.save(saved, path)
        assert torch.equal(read_torch(path)["a"], state["a"])
    with pytest.raises(FileNotFoundError, match=r"none\.pt does not exist"):
        read_torch(tmp_path / "none.pt")
    torch.save({"a": 1}, path)
    with pytest.raises(ValueError, match="expected names and tensors"):
        read_torch(path)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="not a file of tensors alone"):
        read_torch(path)


def test_a_checkpoint_cannot_run_code(tmp_path) -> None:
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a checkpoint ran code",))

    torch.save({"a": Bomb()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="not a file of tensors alone"):
        read_torch(tmp_path / "x.pt")
