"""The page and the picture: complete, self-contained, and safe with any class name."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import font_manager
from matplotlib.font_manager import FontEntry
from PIL import Image
from support.pages import check, self_contained

from vqscale.evaluation import report as report_module
from vqscale.evaluation.figures import (
    Chart,
    chart_svg,
    error_map,
    font_with,
    grid_png,
    label_of_class,
    metrics_of_run,
    png_bytes,
    usage_svg,
)
from vqscale.evaluation.protocols import benchmark_of
from vqscale.evaluation.reconstructions import Examples
from vqscale.evaluation.report import PAPERS, Report, format_score, format_value, render
from vqscale.evaluation.scores import Score

CSS = Path(report_module.__file__).with_name("report.css").read_text()
SECTIONS = [
    "samples",
    "reconstructions",
    "summary",
    "code-usage",
    "curves",
    "rejection",
    "nearest-training-images",
    "the-papers",
    "provenance",
]


def images(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=generator)


def full() -> Report:
    lines = [
        {"images_seen": n * 100, "nll/top": 3 - n / 10, "loss": 3 - n / 10, "held_out/nll/top": 3.1 - n / 10}
        for n in range(1, 6)
    ]
    return Report(
        title="demo",
        subtitle="a test",
        scores={
            "fd_lite0": Score(12.345, 20, "real", "lite0", "ab" * 32, "bilinear", False, "too few images"),
            "fid": Score(31.0, 50_000, "real", "inception", "cd" * 32, "bilinear", True, "", interval=(30.5, 31.5)),
            "kid": Score(None, 20, "real", "lite0", reason="KID needs at least 1000 images"),
            "nll/top": Score(2.5, 20, "codes"),
            "order0_entropy/top": Score(2.9, 20, "codes"),
        },
        benchmark="ImageNet",
        left_out={"cas_top1": "no classifier", "cas_top5": "no classifier"},
        samples={"<b>cats</b> & dogs": list(images(3)), "plain": list(images(2))},
        examples=Examples(images(4), images(4, 1), ["a", "b", "c", "d"]),
        usage={"top": np.array([5, 0, 3, 9])},
        curves={"train_prior_top": lines},
        provenance=[{"name": "vqvae", "fingerprint": "sha256:1", "config": "seed: 0\n<script>alert(1)</script>"}],
        footer="the end",
    )


def test_the_page_is_whole_and_needs_no_network() -> None:
    text = render(full())
    page = check(text)
    assert set(SECTIONS) <= page.ids
    assert self_contained(text)
    assert not re.search(r"@import|url\((?!data:)", CSS)
    assert len(page.alts) == 5 + 3 * 4 + 1 + 1 + 1
    assert {f"#{name}" for name in SECTIONS} <= set(page.addresses)


def test_an_installed_package_has_the_files_beside_its_modules() -> None:
    package = Path(report_module.__file__).parents[1]
    pyproject = (package.parent / "pyproject.toml").read_text()
    declared = re.search(r"\[tool.setuptools.package-data\]\nvqscale = (\[.*\])", pyproject)
    assert declared
    others = [p for p in package.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")]
    assert sorted(p.relative_to(package).as_posix() for p in others) == sorted(json.loads(declared[1]))


def test_numbers_provenance_and_reasons_are_on_the_page() -> None:
    text = render(full())
    assert "31.00 (30.50–31.50)" in text
    for expected in ("12.35", "KID needs at least 1000 images", "abababababab", "too few images", "sha256:1", "–"):
        assert expected in text
    assert re.search("CAS top-1, CAS top-5.*no classifier", text)


def test_names_cannot_break_the_page() -> None:
    text = render(full())
    assert "&lt;b&gt;cats&lt;/b&gt; &amp; dogs" in text and "<b>cats" not in text and "<script>alert" not in text


def test_secrets_of_urls_are_not_on_the_page() -> None:
    url = "https://user:SECRET@host/a b.tar?sig=SECRET"
    about = {
        "name": url,
        "argv": ["pack", f"source={url}"],
        "config": f"source: {url}\nseed: 0",
        "transform": {"a": url},
    }
    scores = {"fid": Score(1.0, 1, url, reason=url)}
    facts = {"left_out": {"kid": url}, "checks": [url], "provenance": [about], "footer": url}
    text = render(Report(title=url, subtitle=url, scores=scores, **facts))
    assert "SECRET" not in text and text.count("https://***@host/a b.tar?sig=***") >= 12


def test_damaged_metrics_and_names_leave_a_page(tmp_path: Path) -> None:
    lines = ['{"images_seen": "x", "loss": 1}', '{"images_seen": NaN}', '{"loss": 1}', "[]", "{torn", "9" * 400, "\0"]
    whole = ['{"images_seen": 1, "loss": NaN}', '{"images_seen": 2, "loss": Infinity, "nll/top": "high"}']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, *whole, '{"images_seen": 3, "loss": 2.5}']))
    metrics = metrics_of_run(tmp_path)
    assert [line["images_seen"] for line in metrics] == [1, 2, 3]
    text = render(Report("caf\udce9", "a\u202eb", {}, samples={"\x1b[2J": [images(1)[0]]}, curves={"run": metrics}))
    assert all(escaped in text for escaped in (r"caf\udce9", r"a\u202eb", r"\x1b[2J")) and text.encode()


def test_an_empty_report_says_what_is_missing() -> None:
    text = render(Report(title="empty", subtitle="", scores={}))
    page = check(text)
    assert set(SECTIONS) <= page.ids
    assert text.count("No ") + text.count("Nothing ") >= 6


def test_the_papers_figures_carry_grades_and_none_is_from_memory() -> None:
    rows = [row for rows in PAPERS.values() for row in rows]
    assert {grade for _, _, grade, _ in rows} == {"P", "S"}
    assert not any("0.0047" in value or "0.0050" in value for _, value, _, _ in rows)
    text = render(full())
    assert "31.11" in text and "3.41 nats per code" in text


@pytest.mark.parametrize(
    ("classes", "benchmark"),
    [
        ([f"n{n:08d}" for n in [1440764, *range(999)]], "ImageNet"),
        ([f"n{n:08d}" for n in [1440764, *range(99)]], ""),
        ([str(n) for n in range(1000)], ""),
        ("ship truck horse frog dog deer cat bird automobile airplane".split(), "CIFAR-10"),
        (["cat", "dog"], ""),
        ([], ""),
    ],
)
def test_the_papers_figures_stand_beside_their_own_data_sets_only(classes: list[str], benchmark: str) -> None:
    assert benchmark_of(classes) == benchmark
    text = render(Report("a title", "", {}, benchmark=benchmark))
    assert ("ImageNet 256" in text) == (benchmark == "ImageNet") and ("4.67" in text) == (benchmark == "CIFAR-10")


def test_pictures_come_first() -> None:
    text = render(full())
    places = [text.index(f'<section id="{name}">') for name in SECTIONS]
    assert places == sorted(places) and text.index('<div class="tiles">') > places[2]


@pytest.mark.parametrize(
    "key, value, shown",
    [
        ("psnr", 23.456, "23.46"),
        ("reconstruction_mse", 0.02468, "0.02468"),
        ("nll/top", 3.4112, "3.411"),
        ("fid", 131.06, "131.1"),
        ("used_codes/top", 512.0, "512"),
        ("recall", 0.0, "0"),
        ("kid", None, "–"),
        ("cas_top1/real", 0.5483, "54.83 %"),
    ],
)
def test_values_have_the_digits_they_deserve(key: str, value: float | None, shown: str) -> None:
    assert format_value(key, value) == shown


def test_png_is_exact_and_the_error_map_is_dark_where_images_agree() -> None:
    image = images(1)[0]
    back = torch.from_numpy(np.array(Image.open(io.BytesIO(png_bytes(image))))).permute(2, 0, 1)
    assert torch.equal(back, image)
    other = image.clone()
    other[:, 0, 0] = 255 - other[:, 0, 0] // 2
    shown = error_map(image, other)
    assert int(shown[:, 5, 5].sum()) < 10 < int(shown[:, 0, 0].sum())


def test_the_distance_of_a_training_run_is_a_curve_of_its_own() -> None:
    lines = [{"images_seen": n, "held_out/fd_lite0/top": 9 - n, "held_out/nll/top": 3, "fd_seconds": 1} for n in (1, 2)]
    text = render(replace(full(), curves={"train_prior_top": lines}))
    assert "train_prior_top: Fréchet distance" in text and "fd_seconds" not in text


def test_charts_are_svg_of_the_same_bytes_each_time() -> None:
    def chart() -> bytes:
        series = {"nll/top": ([1, 2], [3, 2]), "held_out/nll/top": ([2], [2.5])}
        return chart_svg(Chart("t", series, log=True, level=4.0))

    assert chart() == chart() and b"<svg" in chart()
    assert b"<svg" in usage_svg("top level", np.array([3, 0, 1]))


def test_the_grid_shows_every_pixel_enlarged_and_not_smoothed(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "samples.png"
    originals, decoded = images(3), images(3, 1)
    grid_png(path, originals=originals, reconstructions=decoded, samples={"a class": list(images(2, 2))})
    picture = np.array(Image.open(path))
    enlarged = originals[0].permute(1, 2, 0).numpy().repeat(8, 0).repeat(8, 1)  # 16 px -> 128
    side = enlarged.shape[0]
    found = [
        (y, x)
        for y in range(picture.shape[0] - side)
        for x in range(picture.shape[1] - side)
        if (picture[y, x] == enlarged[0, 0]).all() and (picture[y : y + side, x : x + side] == enlarged).all()
    ]
    assert len(found) == 1
    assert list(tmp_path.joinpath("deep").iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "label"),
    [("cat", "cat"), ("Ärger ß", "Ärger ß"), ("a\nb", r"a\nb"), ("\x1b[31m", r"\x1b[31m"), ("\U0003ffff", "class 7")],
)
def test_a_class_has_a_label_that_can_be_drawn(tmp_path: Path, name: str, label: str) -> None:
    assert label_of_class(name, 7) == label
    grid_png(tmp_path / "grid.png", samples={label: list(images(1))})


@pytest.mark.parametrize("name", ["猫", "قط", "बिल्ली", "고양이"])
def test_names_in_other_scripts_are_drawn_or_numbered(tmp_path: Path, name: str) -> None:
    label = label_of_class(name, 7)
    assert label == (name if font_with(name) else "class 7")
    grid_png(tmp_path / "grid.png", samples={label: list(images(1))})


def test_the_machines_fonts_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot be read is passed over; the first that has all characters is taken."""
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    entries = [FontEntry(fname=str(path)) for path in (fonts / "none.ttf", fonts / "STIXNonUni.ttf")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", entries)
    font_with.cache_clear()
    try:
        assert font_with("\ue000") == str(fonts / "STIXNonUni.ttf") and font_with("a") == str(fonts / "DejaVuSans.ttf")
        assert font_with("猫") is None
    finally:
        font_with.cache_clear()


@pytest.mark.parametrize("name", ["a $x_ b$ run", "猫", "a_b^{", "\U0003ffff"])
def test_a_chart_takes_any_title(name: str) -> None:
    assert b"<svg" in chart_svg(Chart(name, {"loss": ([1, 2], [3, 2])}))


def test_a_grid_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no images"):
        grid_png(tmp_path / "x.png")


def test_an_interval_stands_in_brackets_behind_its_value() -> None:
    assert format_score("fid", Score(123.4, 9, interval=(118.04, 128.8))) == "123.4 (118.0–128.8)"
    assert format_score("kid", Score(0.01, 9, interval=(-0.002, 0.022))) == "0.01000 (-0.00200 to 0.02200)"
    assert format_score("fid", Score(123.4, 9)) == "123.4" and format_score("fid", Score(None, 9)) == "–"
