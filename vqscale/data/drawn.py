"""The embedded data set: ten classes of shapes and textures, drawn by arithmetic.

In: (seed, indices, resolution).  Out: uint8 images [n, 3, r, r] and their labels. Image i does not depend on the batch
in which it is drawn. Shapes are large and nearly centred, colours come from a small palette and textures
repeat every quarter of the image, in step with an 8x8 grid of codes, so that a small codebook and a small prior can
learn them in minutes.
"""

import numpy as np
from jaxtyping import Int64, UInt8

from vqscale.seeding import key_of, mix, uniform_array

CLASSES = ("circle", "square", "triangle", "star", "ring", "cross", "rows", "columns", "checkers", "dots")
# Red, yellow, green, blue.
FOREGROUNDS = np.array([(220, 50, 47), (235, 185, 40), (50, 150, 80), (45, 90, 200)], np.float32)
BACKGROUNDS = np.array([(246, 246, 242), (24, 26, 34)], np.float32)  # paper, ink
_PERIOD = 0.25  # of textures, in units of the image width
_PHASES = 2  # number of offsets within a texture's period, so that its bands fall on whole code cells
_MAX_ROTATION = np.pi / 30  # 6 degrees to either side


def draw(
    seed: int, indices: Int64[np.ndarray, " n"], resolution: int
) -> tuple[UInt8[np.ndarray, "n 3 r r"], Int64[np.ndarray, " n"]]:
    """Images `indices` of the endless data set `seed`, and their labels below 10."""
    labels = indices % len(CLASSES)
    coverage = np.empty((len(indices), resolution, resolution), np.float32)
    for label in np.unique(labels):
        chosen = np.flatnonzero(labels == label)
        coverage[chosen] = _coverage(CLASSES[label], seed, indices[chosen], resolution)
    foreground = FOREGROUNDS[_choice(seed, "foreground", indices, len(FOREGROUNDS))][:, :, None, None]
    background = BACKGROUNDS[_choice(seed, "background", indices, len(BACKGROUNDS))][:, :, None, None]
    images = background + coverage[:, None] * (foreground - background)
    return np.rint(images).astype(np.uint8), labels


def _uniform(seed: int, name: str, indices: np.ndarray, low: float, high: float) -> np.ndarray:
    """float32 [n, 1, 1] in [low, high), addressed by (seed, name, index)."""
    values = uniform_array(mix(seed, key_of(f"drawn {name}")), indices.astype(np.uint64))
    return (low + (high - low) * values).astype(np.float32)[:, None, None]


def _choice(seed: int, name: str, indices: np.ndarray, count: int) -> np.ndarray:
    return _uniform(seed, name, indices, 0, count)[:, 0, 0].astype(np.int64)


def _phase(seed: int, name: str, indices: np.ndarray) -> np.ndarray:
    """A fraction of the period, float32 [n, 1, 1]."""
    return _choice(seed, name, indices, _PHASES).astype(np.float32)[:, None, None] / _PHASES


def _coverage(name: str, seed: int, indices: np.ndarray, resolution: int) -> np.ndarray:
    """How much of each pixel the figure covers: float32 [n, r, r] in [0, 1], from its signed distance in pixels."""
    centres = (np.arange(resolution, dtype=np.float32) + 0.5) / resolution  # pixel centres in units of the image width
    unit: float | np.ndarray = _PERIOD  # the length of 1 in image widths
    if name in _TEXTURES:
        x = centres[None, None, :] / _PERIOD + 0.25 + _phase(seed, "x phase", indices)
        y = centres[None, :, None] / _PERIOD + 0.25 + _phase(seed, "y phase", indices)
        distance = _TEXTURES[name](x, y)
    else:
        x, y, unit = _shape_coordinates(seed, indices, centres)
        distance = _SHAPES[name](x, y)
    return np.broadcast_to(np.clip(0.5 - distance * (unit * resolution), 0, 1), (len(indices), resolution, resolution))


def _shape_coordinates(
    seed: int, indices: np.ndarray, centres: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x and y [n, r, r] in which the shape is upright, centred and of radius 1; and the radius [n, 1, 1]."""
    size = _uniform(seed, "size", indices, 0.34, 0.42)
    x = (centres[None, None, :] - 0.5 - _uniform(seed, "x", indices, -0.04, 0.04)) / size
    y = (centres[None, :, None] - 0.5 - _uniform(seed, "y", indices, -0.04, 0.04)) / size
    angle = _uniform(seed, "turn", indices, -_MAX_ROTATION, _MAX_ROTATION)
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * x - sin * y, sin * x + cos * y, size


# Signed distances, negative inside. Shapes have radius 1; textures have period 1.


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y) - 0.95


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.sqrt(x * x + y * y) - 0.75) - 0.25


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.85


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    side = np.abs(x) * np.float32(np.sqrt(0.75)) - y * 0.5
    return np.maximum(side, y) - 0.55


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five points: fold the plane into one tenth of a turn, in which the edge is one straight line."""
    tenth = np.float32(np.pi / 5)
    angle = np.abs(np.mod(np.arctan2(x, -y) + tenth, 2 * tenth) - tenth)
    radius = np.sqrt(x * x + y * y)
    tip, notch = np.array([1.1, 0.0]), 0.48 * np.array([np.cos(tenth), np.sin(tenth)])
    along = (notch - tip) / np.linalg.norm(notch - tip)
    normal = np.array([along[1], -along[0]], np.float32)  # points outwards
    return radius * np.cos(angle) * normal[0] + radius * np.sin(angle) * normal[1] - np.float32(normal @ tip)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - 0.33, y - 1), np.maximum(x - 1, y - 0.33))


def _bands(x: np.ndarray) -> np.ndarray:
    return np.abs(np.mod(x, 1) - 0.5) - 0.25


def _checkers(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    across, down = _bands(x), _bands(y)
    return np.where(across * down > 0, -1, 1) * np.minimum(np.abs(across), np.abs(down))


def _dots(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.mod(x, 1) - 0.5, np.mod(y, 1) - 0.5
    return np.sqrt(x * x + y * y) - 0.32


_SHAPES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}
_TEXTURES = {
    "rows": lambda x, y: _bands(y),
    "columns": lambda x, y: _bands(x),
    "checkers": _checkers,
    "dots": _dots,
}
