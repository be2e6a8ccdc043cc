"""Classification accuracy score: classifiers trained on samples, reconstructions or real images, tested on real ones.

In: finished runs of `train_classifier`, the reference images.  Out: cas_top1 and cas_top5, those of the samples without
a suffix, and beside them `/reconstructions` and `/real`, which say what the score could at best be.
"""

from typing import Any

from vqscale.evaluation.classify import ImageClassifier, accuracy
from vqscale.evaluation.families import Bench
from vqscale.evaluation.inputs import LEARNED_FROM, DataSet, Inputs
from vqscale.evaluation.scores import Score

KEYS = ("cas_top1", "cas_top5")


def score_cas(bench: Bench, found: Inputs) -> None:
    """Accuracy on the reference images of every classifier that is there (Ravuri and Vinyals 2019, section 3)."""
    if not bench.scores.wants(*KEYS):
        return
    if not isinstance(found.reference, DataSet):
        why = found.absent.get("reference", "reference= is a file of statistics, real images are needed")
        bench.scores.leave_out(KEYS, why)
        return
    for name in LEARNED_FROM:
        if name in found.classifiers:
            _score(bench, found.classifiers[name], found.reference, name)
        elif name == "samples":
            bench.scores.leave_out(KEYS, found.absent["classifier_samples"])
        else:
            for key in KEYS:
                bench.scores.leave_out_level(key, name, found.absent[f"classifier_{name}"])


def _score(bench: Bench, classifier: ImageClassifier, reference: DataSet, name: str) -> None:
    about = classifier.source.description
    batches = bench.images(reference, about["resolution"])
    top_1, top_5, n = accuracy(
        classifier, bench.tick(batches, f"accuracy, learned from {name}", len(batches)), bench.topology
    )
    if n != reference.n:
        raise ValueError(f"{reference.n - n} of {reference.n} images could not be read: bad.jsonl names them")
    for key, value in zip(KEYS, (top_1, top_5), strict=True):
        score = Score(
            value,
            n,
            f"learned from {about['learned_from']} ({about['data'][:19]}), tested on {reference.describe()}",
            _network(about),
            classifier.source.fingerprint.removeprefix("sha256:"),
            None,
            False,
            "the classifier is not the papers' (ResNet-50 with batch normalisation)",
        )
        bench.scores.put(key if name == "samples" else f"{key}/{name}", score)


def _network(about: dict[str, Any]) -> str:
    network = about["config"]["network"]
    return {"small": "small ResNet", "resnet50": "ResNet-50, group norm"}.get(network, f"linear on {about['features']}")
