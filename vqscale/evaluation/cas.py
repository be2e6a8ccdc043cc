"""Classification accuracy score: classifiers trained on samples, reconstructions or real images, tested on real ones.

In: a `Bench`, finished runs of `train_classifier`, the reference images, samples.  Out: cas_top1 and cas_top5; those of
the samples without a suffix, and beside them `/reconstructions` and `/real`, which say what the score could at best be.
The reverse is class_accuracy: the classifier of real images, tested on samples.
"""

from collections.abc import Sequence
from typing import Any

from vqscale.evaluation.classify import ImageClassifier, accuracy
from vqscale.evaluation.inputs import LEARNED_FROM, DataSet, Inputs
from vqscale.evaluation.passes import Bench, chunks_of_rank
from vqscale.evaluation.scores import Score

_CAS, _REVERSE = ("cas_top1", "cas_top5"), "class_accuracy"
_OTHER_CLASSIFIER = "the classifier is not the papers' (ResNet-50 with batch normalisation)"


def leave_out_cas(bench: Bench, inputs: Inputs) -> None:
    """Without reference images, or without the classifier that learned from samples; class_accuracy without samples of
    the classes of the classifier of real images."""
    if why := _why_not_reverse(inputs):
        bench.scores.leave_out([_REVERSE], why)
    if why := inputs.why_no_images():
        bench.scores.leave_out(_CAS, why)
        return
    for name in (name for name in LEARNED_FROM if name not in inputs.classifiers):
        why = inputs.absent[f"classifier_{name}"]
        if name == "samples":
            bench.scores.leave_out(_CAS, why)
        else:
            for key in _CAS:
                bench.scores.leave_out_level(key, name, why)


def _why_not_reverse(inputs: Inputs) -> str:
    """Why there is no class_accuracy; "" if there is."""
    real, samples = inputs.classifiers.get("real"), inputs.samples
    if real is None or samples is None:
        return inputs.absent["samples" if samples is None else "classifier_real"]
    same = list(samples.manifest.classes) == real.classes
    return "" if same else f"samples={samples.name}: has other classes than classifier_real"


def score_cas(bench: Bench, inputs: Inputs) -> None:
    """Accuracy on the reference images of every classifier that is given (Ravuri and Vinyals 2019, section 3), and on
    the samples of the classifier of real images (GAN-test of Shmelkov et al. 2018, section 3)."""
    if bench.scores.wants(*_CAS) and isinstance(inputs.reference, DataSet):
        for name, classifier in inputs.classifiers.items():
            keys = [key if name == "samples" else f"{key}/{name}" for key in _CAS]
            _score(bench, classifier, inputs.reference, keys)
    if bench.scores.pending([_REVERSE]) and inputs.samples is not None:
        _score(bench, inputs.classifiers["real"], inputs.samples, [_REVERSE])


def _score(bench: Bench, classifier: ImageClassifier, tested_on: DataSet, keys: Sequence[str]) -> None:
    """Top-1 and top-5 accuracy under these keys; top-1 alone under one key."""
    about = classifier.source.description
    batches = bench.batches(tested_on, about["resolution"], chunks_of_rank(tested_on.n, bench.topology))
    watched = bench.watch(batches, f"accuracy, learned from {about['learned_from']}")
    *values, n = accuracy(classifier, watched, bench.topology)
    if unread := tested_on.n - n:
        raise ValueError(f"{tested_on.name}: {unread} of {tested_on.n} images could not be read: bad.jsonl names them")
    measured = f"learned from {about['learned_from']} ({about['data'][:19]}), tested on {tested_on.describe()}"
    network = _network(about), classifier.source.fingerprint.removeprefix("sha256:")
    for key, value in zip(keys, values, strict=False):
        bench.scores.put(key, Score(value, n, measured, *network, reason=_OTHER_CLASSIFIER))


def _network(about: dict[str, Any]) -> str:
    network = about["config"]["network"]
    return {"small": "small ResNet", "resnet50": "ResNet-50, group norm"}.get(network, f"linear on {about['features']}")
