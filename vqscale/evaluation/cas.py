"""Classification accuracy score: classifiers trained on samples, reconstructions or real images, tested on real ones.

In: a `Bench`, finished runs of `train_classifier`, the reference images.  Out: cas_top1 and cas_top5; those of the
samples without a suffix, and beside them `/reconstructions` and `/real`, which say what the score could at best be.
"""

from typing import Any

from vqscale.evaluation.classify import ImageClassifier, accuracy
from vqscale.evaluation.inputs import LEARNED_FROM, DataSet, Inputs
from vqscale.evaluation.passes import Bench, chunks_of_rank
from vqscale.evaluation.scores import Score, keys_of

_OTHER_CLASSIFIER = "the classifier is not the papers' (ResNet-50 with batch normalisation)"


def leave_out_cas(bench: Bench, inputs: Inputs) -> None:
    """Without reference images, or without the classifier that learned from samples."""
    keys = keys_of("cas")
    if why := inputs.why_no_images():
        bench.scores.leave_out(keys, why)
        return
    for name in (name for name in LEARNED_FROM if name not in inputs.classifiers):
        why = inputs.absent[f"classifier_{name}"]
        if name == "samples":
            bench.scores.leave_out(keys, why)
        else:
            for key in keys:
                bench.scores.leave_out_level(key, name, why)


def score_cas(bench: Bench, inputs: Inputs) -> None:
    """Accuracy on the reference images of every classifier that is given (Ravuri and Vinyals 2019, section 3)."""
    if bench.scores.wants(*keys_of("cas")) and isinstance(inputs.reference, DataSet):
        for name, classifier in inputs.classifiers.items():
            _score(bench, classifier, inputs.reference, name)


def _score(bench: Bench, classifier: ImageClassifier, reference: DataSet, name: str) -> None:
    about = classifier.source.description
    batches = bench.batches(reference, about["resolution"], chunks_of_rank(reference.n, bench.topology))
    watched = bench.watch(batches, f"accuracy, learned from {name}")
    *values, n = accuracy(classifier, watched, bench.topology)
    if unread := reference.n - n:
        raise ValueError(f"{reference.name}: {unread} of {reference.n} images could not be read: bad.jsonl names them")
    measured = f"learned from {about['learned_from']} ({about['data'][:19]}), tested on {reference.describe()}"
    network = _network(about), classifier.source.fingerprint.removeprefix("sha256:")
    for key, value in zip(keys_of("cas"), values, strict=True):
        score = Score(value, n, measured, *network, reason=_OTHER_CLASSIFIER)
        bench.scores.put(key if name == "samples" else f"{key}/{name}", score)


def _network(about: dict[str, Any]) -> str:
    network = about["config"]["network"]
    return {"small": "small ResNet", "resnet50": "ResNet-50, group norm"}.get(network, f"linear on {about['features']}")
