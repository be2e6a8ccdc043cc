import numpy as np
import torch

from vqscale import seeding

GOLDEN = 0x9E3779B97F4A7C15
# The reference implementation's first outputs for the seed 1234567 (Vigna, splitmix64.c).
REFERENCE = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]


def test_one_word_is_splitmix64() -> None:
    assert [seeding.mix(1234567 + k * GOLDEN) for k in range(5)] == REFERENCE


def test_golden_values_never_change() -> None:
    assert seeding.mix() == 0
    assert seeding.mix(1, 2, 3) == 7702586659592502839
    assert seeding.mix(-1) == seeding.mix(2**64 - 1)
    assert seeding.key_of("codebook") == 1487035565678273935
    assert seeding.uniform(5, 7) == 0.6161558000905173
    drawn = torch.randint(0, 1000, (4,), generator=seeding.generator(3, 4)).tolist()
    assert drawn == [145, 746, 456, 244]


def test_order_and_number_of_words_matter() -> None:
    words = [(1, 2), (2, 1), (1,), (1, 2, 0), (0, 1, 2)]
    assert len({seeding.mix(*w) for w in words}) == len(words)


def test_vectorised_is_the_same_arithmetic() -> None:
    positions = np.array([0, 1, 2**40, 2**63 + 5, 2**64 - 1], dtype=np.uint64)
    prefix = seeding.mix(9, seeding.key_of("flip"))
    expected = [seeding.mix(9, seeding.key_of("flip"), int(p)) for p in positions]
    assert seeding.mix_array(prefix, positions).tolist() == expected
    uniforms = [seeding.uniform(9, seeding.key_of("flip"), int(p)) for p in positions]
    assert seeding.uniform_array(prefix, positions).tolist() == uniforms


def test_tensors_are_the_same_arithmetic_in_signed_numbers() -> None:
    words = np.array([0, 1, 2**40, 2**63 + 5, 2**64 - 1], dtype=np.uint64)
    prefix = seeding.mix(9, seeding.key_of("flip"))
    mixed = seeding.mix_tensor(prefix, torch.from_numpy(words.view(np.int64)))
    assert mixed.numpy().view(np.uint64).tolist() == seeding.mix_array(prefix, words).tolist()


def test_uniforms_are_spread_over_the_unit_interval() -> None:
    drawn = seeding.uniform_array(seeding.mix(1), np.arange(100_000, dtype=np.uint64))
    assert 0 <= drawn.min() and drawn.max() < 1
    counts = np.histogram(drawn, bins=20, range=(0, 1))[0]
    assert abs(counts - 5000).max() < 5 * 5000**0.5


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    torch.randn(3, generator=seeding.generator(1))
    assert torch.equal(before, torch.get_rng_state())
