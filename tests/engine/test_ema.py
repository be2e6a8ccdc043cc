import pytest
import torch
from support.training import TinyModel

from vqscale.engine.ema import WeightEMA
from vqscale.engine.tensors import exchange


def weights_of(model: TinyModel) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def test_it_follows_the_formula() -> None:
    weights = {"w": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    ema = WeightEMA(weights, halflife=100, rampup=0.5)
    expected = weights["w"].clone()
    for seen in range(20, 420, 20):
        weights["w"].add_(torch.tensor([0.3, 0.1], dtype=torch.float64) * seen)
        ema.update(seen, 20)
        decay = 0.5 ** (20 / min(100, 0.5 * seen))
        expected = decay * expected + (1 - decay) * weights["w"]
        torch.testing.assert_close(ema.averages["w"], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("batch", [10, 25, 100])
def test_half_of_the_old_is_left_after_a_half_life(batch: int) -> None:
    weights = {"w": torch.zeros(1, dtype=torch.float64)}
    ema = WeightEMA(weights, halflife=100, rampup=0.0)
    weights["w"].fill_(1.0)
    for seen in range(batch, 101, batch):
        ema.update(seen, batch)
    assert ema.averages["w"].item() == pytest.approx(0.5, rel=1e-12)


def test_exchanging_twice_restores_every_bit() -> None:
    model = TinyModel()
    ema = WeightEMA(weights_of(model), halflife=10, rampup=0.0)
    for p in model.parameters():
        p.data.mul_(1.1)
    ema.update(8, 8)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    averages = {name: average.clone() for name, average in ema.averages.items()}
    exchange(weights_of(model), ema.averages)
    for name, p in model.named_parameters():
        assert torch.equal(p, averages[name]) and not torch.equal(p, weights[name])
    exchange(weights_of(model), ema.averages)
    for name, p in model.named_parameters():
        assert torch.equal(p, weights[name])
        assert torch.equal(ema.averages[name], averages[name])


def test_averages_are_not_the_weights_themselves() -> None:
    model = TinyModel()
    ema = WeightEMA(weights_of(model), halflife=10, rampup=0.0)
    before = ema.averages["head.weight"].clone()
    model.head.weight.data.add_(1.0)
    assert torch.equal(ema.averages["head.weight"], before)
