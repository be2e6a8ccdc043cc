import numpy as np
import pytest

from vqscale.data.order import ShuffleOrder, permute


def located(order: ShuffleOrder, positions: range) -> list[tuple[int, int, int]]:
    return list(zip(*(part.tolist() for part in order.locate(np.array(positions))), strict=True))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 31, 100, 1023, 1024, 1025, 20011])
def test_permute_is_a_bijection(size: int) -> None:
    for key in (0, 1, 2**64 - 1):
        assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_permute_reaches_every_index_evenly() -> None:
    """Over keys, each of 5 items comes at each of 5 indexes about equally often (chi-squared, 16 degrees)."""
    counts = np.zeros((5, 5))
    for key in range(1000):
        counts[np.arange(5), permute(np.arange(5), 5, key)] += 1
    assert ((counts - 200) ** 2 / 200).sum() < 45  # p = 1e-4


def test_neighbours_do_not_stay_neighbours() -> None:
    order = permute(np.arange(10_000), 10_000, 3)
    assert (np.abs(np.diff(order)) == 1).sum() < 10


@pytest.mark.parametrize("window", [0, 1, 2, 3, 5, 64])
@pytest.mark.parametrize("sizes", [(7, 1, 13, 5, 11), (3,), (1, 1, 1), (0, 4, 0, 9), (97, 101, 103)])
def test_every_epoch_visits_every_sample_once(sizes: tuple[int, ...], window: int) -> None:
    order = ShuffleOrder(sizes, 5, window)
    everything = {(shard, row) for shard, size in enumerate(sizes) for row in range(size)}
    for epoch in range(3):
        samples = located(order, range(epoch * sum(sizes), (epoch + 1) * sum(sizes)))
        assert {sample[0] for sample in samples} == {epoch}
        assert len(samples) == len(everything) and {sample[1:] for sample in samples} == everything


def test_epochs_and_seeds_differ() -> None:
    sizes, total = (7, 1, 13, 5, 11), 37
    first, second = (located(ShuffleOrder(sizes, 5, 2), range(e * total, (e + 1) * total)) for e in range(2))
    assert [p[1:] for p in first] != [p[1:] for p in second]
    assert first != located(ShuffleOrder(sizes, 6, 2), range(total))


def test_a_window_holds_no_more_than_its_shards() -> None:
    order = ShuffleOrder([10] * 12, 1, 3)
    for start in range(0, 120, 30):
        shards = {shard for _, shard, _ in located(order, range(start, start + 30))}
        assert len(shards) == 3
        assert shards == set(order.window_shards(start)[1].tolist())
        assert shards == set(order.window_shards(start + 29)[1].tolist())


def test_the_window_ahead_crosses_the_epoch() -> None:
    order = ShuffleOrder([10] * 4, 1, 2)
    assert order.window_shards(25, ahead=1)[1].tolist() == order.window_shards(40)[1].tolist()
    assert order.window_shards(25, ahead=1)[0] == order.window_shards(40)[0]


def test_without_a_window_the_order_is_as_stored() -> None:
    assert located(ShuffleOrder([2, 3], 9, 0), range(6)) == [
        (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 1, 2), (1, 0, 0),
    ]  # fmt: skip


def test_one_position_at_a_time_gives_the_same() -> None:
    order = ShuffleOrder([7, 1, 13, 5, 11], 5, 2)
    assert located(order, range(20, 60)) == [located(order, range(p, p + 1))[0] for p in range(20, 60)]


def test_golden_vectors() -> None:
    """The order is a format: runs in progress depend on it. These numbers never change under the name feistel-v1."""
    assert permute(np.arange(10), 10, 42).tolist() == GOLDEN_PERMUTATION
    order = ShuffleOrder([7, 1, 13, 5, 11], 5, 2)
    assert located(order, range(34, 40)) == GOLDEN_SAMPLES
    far = ShuffleOrder([1251] * 1024, 1, 64)
    assert located(far, range(24_000_000_000, 24_000_000_003)) == GOLDEN_FAR


GOLDEN_PERMUTATION = [4, 9, 1, 2, 8, 0, 3, 7, 6, 5]
GOLDEN_SAMPLES = [(0, 2, 2), (0, 2, 12), (0, 2, 7), (1, 4, 0), (1, 4, 10), (1, 4, 8)]
GOLDEN_FAR = [(18735, 156, 651), (18735, 494, 714), (18735, 141, 233)]


def test_an_empty_data_set_has_no_order() -> None:
    with pytest.raises(ValueError, match="0 samples"):
        ShuffleOrder([], 1, 4)
