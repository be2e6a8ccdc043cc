"""scores.json: the fields, the order, what is asked for and what is left out."""

import dataclasses
import json

import pytest

from vqscale.evaluation.features import Extractor, Features
from vqscale.evaluation.metrics import TooFew
from vqscale.evaluation.protocols import Standing
from vqscale.evaluation.scores import METRICS, Score, Scores, metric_of, score_or_null

FIELDS = [
    *("value", "n", "reference", "extractor", "weights_sha256", "resize", "comparable_with_papers", "reason"),
    *("protocol", "preparation", "interval"),
]


def extractor(name: str, verified: bool = True) -> Extractor:
    return Extractor(name, "ab" * 32, verified, "bilinear", "p", lambda images: Features(images, images))


def test_a_score_has_the_fields_of_the_contract_in_order() -> None:
    scores = Scores()
    scores.put("used_codes/top", Score(3.0, 10))
    scores.put("fd_lite0", Score(1.5, 10, "real", "lite0", "ab", "bilinear", False, "why"))
    written = scores.as_json()
    assert list(written) == ["fd_lite0", "used_codes/top"]  # the table's order, not that of computing
    assert all(list(entry) == FIELDS for entry in written.values())
    assert [field.name for field in dataclasses.fields(Score)] == FIELDS


def test_the_names_that_scripts_rely_on_are_there() -> None:
    promised = (
        "fid sfid kid inception_score precision recall density coverage fd_lite0 reconstruction_mse reconstruction_fid "
        "psnr ssim lpips nll order0_entropy perplexity used_codes bits_per_dim cas_top1 cas_top5"
    )
    assert set(promised.split()) <= set(METRICS)
    assert metric_of("nll/top").unit == "nats per code"


def test_a_misspelt_metric_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown metric presicion; did you mean precision"):
        Scores(["presicion"])


def test_only_what_was_asked_for_is_kept() -> None:
    scores = Scores(["kid"])
    scores.put("psnr", Score(1.0, 2))
    assert scores.by_key == {} and scores.wants("kid", "psnr") and not scores.wants("psnr")


def test_a_missing_input_is_an_error_only_for_what_was_asked_by_name() -> None:
    everything = Scores()
    everything.leave_out(["fid", "kid"], "no samples")
    assert everything.left_out == {"fid": "no samples", "kid": "no samples"}
    with pytest.raises(ValueError, match="metrics=fid cannot be computed: no samples"):
        Scores(["fid"]).leave_out(["fid", "kid"], "no samples")
    Scores(["psnr"]).leave_out(["fid", "kid"], "no samples")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_no_number_is_null_with_the_reason(value: float) -> None:
    scores = Scores()
    scores.put("psnr", Score(value, 9, "real", comparable_with_papers=True))
    score = scores.by_key["psnr"]
    assert score.value is None and score.reason == f"the computed value is {value}" and not score.comparable_with_papers
    json.dumps(scores.as_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("key", "value", "error", "interval"),
    [
        ("fid", 5.0, 1.0, (3.04, 6.96)),
        ("fid", 5.0, 10.0, (0.0, 24.6)),
        ("kid", 0.1, 0.1, (-0.096, 0.296)),
        ("recall", 0.9, 0.1, (0.704, 1.0)),
    ],
)
def test_an_interval_ends_where_the_metric_does(
    key: str, value: float, error: float, interval: tuple[float, float]
) -> None:
    scores = Scores()
    scores.put(key, score_or_null(lambda: value, 9, "real", None, Standing(), lambda: error))
    low, high = scores.by_key[key].interval or (None, None)
    assert (low, high) == pytest.approx(interval)


def test_where_the_error_is_unknown_there_is_no_interval() -> None:
    def fails() -> float:
        raise TooFew("density needs at least 6 images")

    scores = Scores()
    for error in (None, fails, lambda: float("nan")):
        scores.put("fid", score_or_null(lambda: 5.0, 9, "real", None, Standing(), error))
        assert scores.by_key["fid"].value == 5 and scores.by_key["fid"].interval is None


def test_too_few_images_give_null_and_the_reason() -> None:
    def fails() -> float:
        raise TooFew("KID needs at least 1000 images, there are 3 samples")

    score = score_or_null(fails, 3, "real", extractor("inception"), Standing())
    assert score.value is None and not score.comparable_with_papers and "1000" in score.reason
    assert score.extractor == "inception" and score.weights_sha256 == "ab" * 32


def test_a_score_says_by_which_protocol_it_is_comparable() -> None:
    stands = Standing("adm_gfid", "ADM's own", "")
    score = score_or_null(lambda: 2.0, 50_000, "real", extractor("inception"), stands)
    assert score.comparable_with_papers and (score.protocol, score.preparation) == ("adm_gfid", "ADM's own")
    other = score_or_null(lambda: 2.0, 400, "real", extractor("inception"), Standing("adm_gfid", None, "too few"))
    assert not other.comparable_with_papers and other.reason == "too few"
