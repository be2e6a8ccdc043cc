"""The Python API: trained models on disk -> codes, images, samples.

In: paths of exported folders or of done runs, or names on the Hugging Face Hub.  Out: tensors.  Images are float
[n, 3, R, R] in [-1, 1]; codes are one int64 [n, h, w] per level, the top level first, in 0 … K - 1.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqscale.config import from_dict, level_names
from vqscale.data.images import decode_image, read_image_file, resize_center_crop, to_float
from vqscale.hub import local_folder
from vqscale.models.pretrained import CONFIG
from vqscale.models.sampling import PER_LEVEL
from vqscale.sources import load_model
from vqscale.stages.sample import Chain, SampleConfig, check_options, chosen_classes, draw, load_chain
from vqscale.text import error_prefix
from vqscale.waiting import adapted

PerLevel = float | Mapping[str, float]  # one number for all levels, or one by level name


class VQVAE:
    """A trained VQ-VAE.

    resolution: R. num_codes: K. grids: (h, w) per level, top first. classes: names, in the order of labels; may be
    empty. fingerprint: of the weights. tokenizer: of the codes, as their data sets state it; the
    fingerprint, but for a decoder that was tuned alone.
    """

    def __init__(self, model: Any, classes: Sequence[str], fingerprint: str, tokenizer: str = ""):
        self.model, self.classes, self.fingerprint = model, list(classes), fingerprint
        self.tokenizer = tokenizer or fingerprint
        self.resolution: int = model.resolution
        self.num_codes: int = model.num_codes
        self.grids: list[tuple[int, int]] = model.grids

    @classmethod
    def from_pretrained(cls, path: str | Path, *, revision: str | None = None, device: str = "cpu") -> "VQVAE":
        """From an exported folder, a done run of train_vqvae, or a folder that holds either beside its priors.

        Text of the form org/name that is no folder here names a repository on the Hugging Face Hub; revision: a branch,
        a tag or a commit of it. What is downloaded stays in the Hub's cache.

        Raises FileNotFoundError where there is none, ValueError for one that is unfinished or damaged, OSError for a
        download that fails.
        """
        usable = _usable_device(device)
        source = load_model(local_folder(path, ["vqvae"], revision), "vqvae", device=usable)
        return cls(source.model, source.description["classes"], source.fingerprint, source.tokenizer)

    @torch.inference_mode()
    def encode(self, images: Tensor) -> list[Tensor]:
        """Images, float [n, 3, R, R] in [-1, 1] or uint8 -> codes int64 [n, h, w] per level, top first.

        Raises ValueError for another size or range.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images have shape {list(images.shape)}: [n, 3, {self.resolution}, {self.resolution}] is needed"
            )
        if images.dtype == torch.uint8:
            images = to_float(images)
        elif not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}: floats in [-1, 1] or uint8 are needed")
        elif images.numel() and not (most := float(images.abs().max())) <= 1.01:
            raise ValueError(f"images reach {most:g}: floats must be in [-1, 1]; uint8 in [0, 255] is taken as well")
        return self.model.encode(images.to(self._device))

    @torch.inference_mode()
    def decode(self, codes: Sequence[Tensor]) -> Tensor:
        """Codes int [n, h, w] per level, top first -> images float [n, 3, R, R] in [-1, 1].

        Raises ValueError for other grids, or codes that are not in 0 … K - 1.
        """
        if [tuple(level.shape[1:]) for level in codes] != self.grids:
            raise ValueError(f"codes have grids {[tuple(level.shape[1:]) for level in codes]}, needed are {self.grids}")
        if len({len(level) for level in codes}) > 1:
            raise ValueError(f"codes are of {[len(level) for level in codes]} images, level by level")
        for level in codes:
            if level.is_floating_point() or level.dtype == torch.bool:
                raise ValueError(f"codes are {level.dtype}: integers are needed")
            level = level.long()  # torch has no minimum of uint16
            if level.numel() and not 0 <= int(level.min()) <= int(level.max()) < self.num_codes:
                raise ValueError(f"codes from {int(level.min())} to {int(level.max())}, but K = {self.num_codes}")
        return self.model.decode([level.to(self._device, torch.int64) for level in codes]).float().clamp(-1, 1)

    def load_images(self, paths: str | Path | Iterable[str | Path]) -> Tensor:
        """Image files, or one -> float [n, 3, R, R] in [-1, 1]: the central square, resized, as `vqscale pack` does it.

        Raises ValueError for no path, or a file that is no picture.
        """
        paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
        if not paths:
            raise ValueError("load_images: no paths were given")
        return to_float(torch.stack([resize_center_crop(_picture(path), self.resolution) for path in paths]))

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def _picture(path: str | Path) -> Tensor:
    with error_prefix(path):
        return decode_image(read_image_file(path))


def sample(
    path: str | Path,
    *,
    revision: str | None = None,
    classes: Any = "all",
    samples_per_class: int = 1,
    seed: int = 0,
    temperature: PerLevel | None = None,
    top_k: PerLevel | None = None,
    top_p: PerLevel | None = None,
    guidance: PerLevel | None = None,
    batch: int = 32,
    threads: int = 0,
    device: str = "cpu",
) -> Tensor:
    """New images, float [n, 3, R, R] in [-1, 1], class by class in the order of `classes`.

    path: a folder with a VQ-VAE and a prior per level, exported (`vqvae`, `prior_top`, …) or an experiment's done runs
    (`train_vqvae`, `train_prior_top`, …), or the name of such a folder on the Hub, with its revision, as
    `VQVAE.from_pretrained` takes it. classes: "all", or names (text) and indices (integers). seed: the same seed gives
    the same images, those of `vqscale sample` with the same seed, options and batch. temperature, top_k, top_p,
    guidance: as there; one number, or one by level: {"top": 0.9}; None = as an exported folder's own samples were drawn
    (`sampling` in its config.json files), else as the priors were trained: 1, 0, 1, 0. threads: of the CPU, during this
    call; 0 = as torch is set.

    Raises FileNotFoundError for a model that is not there, ValueError for models that do not belong together, an
    unknown class or an option out of range, OSError for a download that fails.
    """
    options = {"seed": seed, "samples_per_class": samples_per_class, "batch": batch, "threads": threads}
    models = ["vqvae", *(f"prior_{level}" for level in level_names(3))]
    _checked(options)  # before anything is downloaded
    usable = _usable_device(device)
    inputs = dict.fromkeys(models, str(local_folder(path, models, revision)))
    chain = load_chain(_checked(inputs | options), usable)
    asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance}
    levels = chain.vqvae.model.level_names
    given = {key: _by_level(value, levels) for key, value in asked.items() if value is not None}
    # With a temperature or a guidance of the caller's, what the folder says of its course along the codes is void
    own = {key: value for key, value in _own_options(chain).items() if key.partition("_")[0] not in given}
    config = _checked(inputs | options | own | given)
    check_options(config, chain)
    chosen = _labels(classes, chain.classes)
    labels = torch.tensor(chosen, dtype=torch.int64).repeat_interleave(config.samples_per_class).to(device)
    if not len(labels):
        raise ValueError(f"nothing to sample: {samples_per_class} samples of {len(chosen)} classes")
    ids = torch.arange(len(labels), device=device)
    with _threads(config.threads), adapted(usable):
        blocks = zip(labels.split(config.batch), ids.split(config.batch), strict=True)
        return to_float(torch.cat([draw(config, chain, some, of).cpu() for some, of in blocks]))


def _checked(options: Mapping[str, Any]) -> SampleConfig:
    """The stage's config, whose ranges hold for the API as well."""
    return from_dict(SampleConfig, {key: _plain(value) for key, value in options.items()}, "vqscale.sample")


def _own_options(chain: Chain) -> dict[str, dict[str, Any]]:
    """By option and level, how an exported folder's own samples were drawn. Raises ValueError for what is no option."""
    options: dict[str, dict[str, Any]] = {}
    for level, prior in chain.priors.items():
        where, stated = f"{prior.path / CONFIG}: sampling", prior.description.get("sampling", {})
        if not isinstance(stated, Mapping) or not stated.keys() <= set(PER_LEVEL):
            raise ValueError(f"{where} is {stated!r}: options by name are needed, of {', '.join(PER_LEVEL)}")
        from_dict(SampleConfig, {option: {level: value} for option, value in stated.items()}, where)
        for option, value in stated.items():
            options.setdefault(option, {})[level] = value
    return options


def _plain(value: Any) -> Any:
    """NumPy's numbers, and those of others, as Python's."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _by_level(value: Any, levels: Sequence[str]) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else dict.fromkeys(levels, value)


def _labels(classes: Any, names: Sequence[str]) -> list[int]:
    """Integers are indices, text is names. Raises ValueError naming what is neither."""
    if isinstance(classes, str) and classes == "all":
        return chosen_classes("all", names)
    if hasattr(classes, "tolist"):  # arrays and tensors
        classes = classes.tolist()
    labels = []
    for one in classes if isinstance(classes, Iterable) and not isinstance(classes, str) else [classes]:
        if isinstance(one, str):
            labels += chosen_classes([one], names)
        elif isinstance(one, Integral) and not isinstance(one, bool) and 0 <= int(one) < len(names):
            labels.append(int(one))
        else:
            raise ValueError(f"classes: {one!r} is no class name of the {len(names)}, and no index below that")
    return labels


def _usable_device(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device).add_(1)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ValueError(f"device={name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch's CPU threads, given back afterwards; 0 = as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
