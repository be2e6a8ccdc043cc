"""Protocols: what must hold before a number may stand beside those of papers, and what does not hold of one.

In: the facts behind a number, by name: counts, resolutions, how images were prepared, the network.  Out: the protocol
that its metric belongs to, and every fact that differs from it, with both values. An unknown fact differs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vqscale.data.images import ADM, CENTER, preparation
from vqscale.evaluation.features import INCEPTION_RESIZE, INCEPTION_SHA256, Extractor

Facts = dict[str, str | int | None]

# Of VIRTUAL_imagenet256_labeled.npz as OpenAI distributes it: moments of the training set, and 10,000 of its images.
ADM_SHA256 = "b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758"
ADM_REFERENCE = f"ADM's VIRTUAL_imagenet256_labeled.npz (sha256 {ADM_SHA256[:12]})"
IMAGE_SET = "a set of images"
IMAGENET_VALIDATION = "ImageNet validation"
LOSSLESS = "lossless PNG"
UNVERIFIED = "unverified weights"  # a fact about any network

_INCEPTION: Facts = {
    "extractor": "inception",
    "extractor weights": f"sha256 {INCEPTION_SHA256}",
    "extractor resize": INCEPTION_RESIZE,
}
_SAMPLES: Facts = {"samples": 50_000, "sample resolution": 256, "sample encoding": LOSSLESS}
_AGAINST_ADM: Facts = _SAMPLES | {"reference": ADM_REFERENCE} | _INCEPTION
_VALIDATION: Facts = {
    "reference": IMAGE_SET,
    "reference split": IMAGENET_VALIDATION,
    "reference images": 50_000,
    "reference resolution": 256,
    "reference resize": ADM,
    "reference crop": CENTER,
    "reference encoding": LOSSLESS,
}
_VQVAE2: Facts = {"sample resolution": 256, **_INCEPTION}


@dataclass(frozen=True)
class Protocol:
    """How papers measure. wants: the facts by metric. unknown: what `source` leaves open; then no number is comparable
    under it."""

    name: str
    source: str
    wants: Mapping[str, Facts]
    unknown: tuple[str, ...] = ()


_TABLE = (
    Protocol(
        "adm_gfid",
        "Dhariwal and Nichol 2021, section 2.2, and evaluations/evaluator.py of its code",
        {
            "fid": _AGAINST_ADM,
            "sfid": _AGAINST_ADM,
            "inception_score": _SAMPLES | _INCEPTION,
            "precision": _AGAINST_ADM | {"reference images": 10_000},
            "recall": _AGAINST_ADM | {"reference images": 10_000},
        },
    ),
    Protocol(
        "rfid_imagenet_val",
        "Sun et al. 2024 (LlamaGen), tokenizer/tokenizer_image/reconstruction_vq_ddp.py and validation/val_ddp.py",
        {"reconstruction_fid": _VALIDATION | _INCEPTION, "psnr": _VALIDATION},
    ),
    Protocol(
        "vqvae2",
        "Razavi et al. 2019, as transcribed by secondary sources",
        {key: _VQVAE2 for key in ("fid", "precision", "recall")}
        | {"reconstruction_fid": {"reference resolution": 256, **_INCEPTION}},
        ("count of samples", "reference split", "count of reference images", "preparation of images"),
    ),
)
PROTOCOLS = {protocol.name: protocol for protocol in _TABLE}


@dataclass(frozen=True)
class Standing:
    """Where a number stands. protocol: that of its metric, None without one. preparation: of the reference images, in
    words. reason: why papers' numbers may not stand beside it, or ""."""

    protocol: str | None = None
    preparation: str | None = None
    reason: str = ""


def judge(metric: str, facts: Facts, chosen: str = "") -> Standing:
    """Of a number with these facts. chosen: the protocol that the config names; "" = the first that has the metric."""
    candidates = [PROTOCOLS[chosen]] if chosen else PROTOCOLS.values()
    protocol = next((one for one in candidates if metric in one.wants), None)
    reasons = differences(protocol.wants[metric], facts) if protocol else ["papers have no common protocol for it"]
    if protocol and protocol.unknown:
        reasons.append(f"its source does not give the {', '.join(protocol.unknown)}")
    if facts.get(UNVERIFIED):
        reasons.append("weights of unknown origin")
    where = f"not as {protocol.name}: " if protocol and reasons else ""
    words = str(facts["preparation"]) if "preparation" in facts else None
    return Standing(protocol.name if protocol else None, words, where + "; ".join(reasons))


def differences(wants: Facts, facts: Facts) -> list[str]:
    """Every fact that is not as it should be, in words: the unknown ones first, as one."""
    unknown = [name for name in wants if facts.get(name) is None]
    differ = [name for name in wants if name not in unknown and facts[name] != wants[name]]
    if "extractor" in differ:  # of another network these differ, too
        differ = [name for name in differ if not name.startswith("extractor ")]
    lines = [f"{', '.join(unknown)}: unknown"] if unknown else []
    return lines + [f"{name}: {_text(facts[name])}, not {_text(wants[name])}" for name in differ]


def _text(value: str | int | None) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


# --- facts ------------------------------------------------------------------------------------------------------------


def sample_facts(n: int, transform: Mapping[str, Any]) -> Facts:
    """Of n generated images, stored as `transform` of their data set says."""
    return {"samples": n, "sample resolution": transform.get("resolution"), "sample encoding": encoding(transform)}


def image_set_facts(n: int, split: str | None, transform: Mapping[str, Any]) -> Facts:
    """Of n reference images, prepared as `transform` of their data set says."""
    return {
        "reference": IMAGE_SET,
        "reference split": split,
        "reference images": n,
        "reference resolution": transform.get("resolution"),
        "reference resize": transform.get("resize"),
        "reference crop": transform.get("crop"),
        "reference encoding": encoding(transform),
        "preparation": preparation(transform),
    }


def extractor_facts(extractor: Extractor | None) -> Facts:
    """Of the network behind a number, if there is one."""
    if extractor is None:
        return {}
    return {
        "extractor": extractor.name,
        "extractor weights": weights_fact(extractor.weights_sha256),
        "extractor resize": extractor.resize,
        UNVERIFIED: not extractor.verified,
    }


def weights_fact(sha256: str) -> str:
    """As many digits of a file's sha256 as are known of Inception's."""
    return f"sha256 {sha256[: len(INCEPTION_SHA256)]}"


def encoding(transform: Mapping[str, Any]) -> str | None:
    """How images are stored, None where the data set does not say."""
    names = {"png": LOSSLESS, "jpg": f"JPEG of quality {transform.get('quality', 'unknown')}"}
    return names.get(str(transform.get("format")))


def benchmark_of(classes: Sequence[str]) -> str:
    """Whose data set has these classes: ImageNet | CIFAR-10 | "" for any other."""
    if len(classes) == 1000 and any(name.startswith(("n01440764", "tench")) for name in classes):
        return "ImageNet"
    return "CIFAR-10" if set(classes) == _CIFAR10 else ""


_CIFAR10 = {"airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"}


def merged(protocol: Protocol, metrics: Iterable[str]) -> Facts:
    """All that these metrics of a protocol want."""
    return {name: want for metric in metrics for name, want in protocol.wants[metric].items()}
