import numpy as np
import pytest

from vqscale.data.drawn import CLASSES, draw


def test_an_image_does_not_depend_on_its_company() -> None:
    together, labels = draw(3, np.arange(40), 32)
    assert labels.tolist() == [i % 10 for i in range(40)] and len(CLASSES) == 10
    for i in (0, 7, 39):
        assert np.array_equal(draw(3, np.array([i]), 32)[0][0], together[i])


@pytest.mark.parametrize("resolution", [1, 16, 33, 64])
def test_any_resolution(resolution: int) -> None:
    images, _ = draw(0, np.arange(10), resolution)
    assert images.shape == (10, 3, resolution, resolution) and images.dtype == np.uint8


def test_seeds_and_indices_differ() -> None:
    (first, labels), (second, _) = draw(0, np.arange(200), 16), draw(1, np.arange(200), 16)
    shapes = labels < 6  # textures have few colours and places, so that some are alike
    assert len({image.tobytes() for image in (*first[shapes], *second[shapes])}) == 2 * shapes.sum()
    assert len({image.tobytes() for image in first[~shapes]}) > 30


def test_figures_are_large_and_of_few_colours() -> None:
    """Two flat colours cover most of each image; the figure covers 15 to 75 %."""
    for image in draw(0, np.arange(50), 64)[0]:
        colours, counts = np.unique(image.reshape(3, -1), axis=1, return_counts=True)
        largest = np.sort(counts)[::-1]
        assert largest[:2].sum() > 0.7 * 64 * 64
        assert 0.15 < largest[1] / largest[:2].sum() < 0.75


def test_classes_are_told_apart_by_a_nearest_mean() -> None:
    """Even the crudest classifier, on edges, does far better than chance: the classes look different."""

    def edges(images: np.ndarray) -> np.ndarray:
        gray = images.astype(np.float32).mean(1)
        return np.stack([np.abs(np.diff(gray, axis=a))[:, :31, :31] > 20 for a in (1, 2)], 1).reshape(len(gray), -1)

    train, labels = draw(0, np.arange(1000), 32)
    test, truth = draw(1, np.arange(200), 32)
    means = np.stack([edges(train)[labels == c].mean(0) for c in range(10)])
    found = ((edges(test)[:, None] - means) ** 2).sum(-1).argmin(1)
    assert (found == truth).mean() > 0.6
