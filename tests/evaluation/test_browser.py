"""The report in a real browser: it loads without an error, shows every picture, and fits a phone and a screen."""

import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.browser import CHROMIUM, QUIET, dumped

from vqscale.evaluation import compare
from vqscale.evaluation.reconstructions import Examples
from vqscale.evaluation.report import Report, render
from vqscale.evaluation.samples import Neighbours
from vqscale.evaluation.scores import METRICS, Score

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; .ci/run installs one")
WIDTHS = (400, 1400)
WATCH = (
    "<script>window.errors = []; addEventListener('error', e => errors.push(`${e.message} ${e.target}`), true)</script>"
)
# In a page of frames, one per width, each with the report: a media query in a frame goes by the frame's width.
PROBE = """
<script>
addEventListener('load', () => {
  const found = [...document.querySelectorAll('iframe')].map(frame => {
    const page = frame.contentDocument, root = page.documentElement, images = [...page.images];
    const box = page.querySelector('dialog'), picture = page.querySelector('button.zoom img');
    picture.click();
    const opened = box.open && box.querySelector('img').src === picture.src;
    box.click();
    const all = [...page.querySelectorAll('main *')], edge = root.clientWidth + 1;
    const cut = all.filter(e => !e.parentElement.closest('.scroll') && e.getBoundingClientRect().right > edge);
    const size = e => parseFloat(frame.contentWindow.getComputedStyle(e).fontSize);
    const small = all.filter(e => ['TD', 'P', 'LI'].includes(e.tagName) && size(e) < 12);
    return {width: root.clientWidth, overflow: root.scrollWidth - root.clientWidth, images: images.length,
      broken: images.filter(i => !i.naturalWidth && i.closest('dialog') === null).length, opened, closed: !box.open,
      cut: cut.map(e => e.outerHTML.slice(0, 80)), small: small.length, errors: frame.contentWindow.errors,
      scrolls: [...page.querySelectorAll('.scroll')].some(e => e.scrollWidth > e.clientWidth),
      wide: [...page.querySelectorAll('.card')].some(e => e.scrollWidth > e.clientWidth),
      heads: [...page.querySelectorAll('thead')].some(e => e.offsetHeight > 0)};
  });
  document.body.replaceChildren(Object.assign(document.createElement('pre'), {textContent: JSON.stringify(found)}));
});
</script>
"""


def images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def full() -> Report:
    """A report with something in every section, and with names and reasons that are long."""
    long = "runs/an-experiment/with_a_name_that_is_much_longer_than_names_should_be_on_a_telephone, sha256:0123456789"
    scores = {
        key: Score(1.23456, 50_000, long, "lite0", "ab" * 32, "bilinear, antialiased", reason=long) for key in METRICS
    }
    for rate in (1.0, 0.5, 0.1):
        scores |= {f"{key}/accepted_{rate:.2f}": Score(10 / rate, int(100 * rate)) for key in ("fid", "recall")}
    scores["fid/random_0.50"] = Score(30.0, 50)
    lines = [{"images_seen": n, "nll/top": 3 / n, "held_out/nll/top": 3 / n, "accuracy_top1": 0.1} for n in (1, 2, 3)]
    return Report(
        benchmark="ImageNet",
        title="an-experiment-with-a-long-name: evaluation",
        subtitle="2026-01-01 · 200 samples of 10 classes · " + long,
        scores=scores,
        left_out={"sfid": "extractor=inception needs weights=PATH", "nll/middle": long},
        samples={f"class {n} with a long name": list(images(10)) for n in range(4)},
        examples=Examples(images(5), images(5), ["a", "b", "c", "d", "e"]),
        usage={"top": np.arange(64), "bottom": np.arange(64)},
        curves={"train_prior_top": lines},
        neighbours=Neighbours(
            images(3, 4), torch.ones(3, 3, dtype=torch.float64), [["a", "b", "c", "d"]] * 3, "Median distance: 1."
        ),
        checks=["The reference is at distance 0 from itself."],
        provenance=[{"name": "vqvae: " + long, "fingerprint": "sha256:" + "0" * 64, "config": "seed: 0\n" * 20}],
        footer="the end",
    )


def looked_at(text: str, folder: Path) -> list[dict[str, Any]]:
    """What a page looks like at each of WIDTHS."""
    page = html.escape(text.replace("<head>", "<head>" + WATCH, 1), quote=True)
    frames = "".join(
        f'<iframe width="{width}" height="1000" style="border:0" srcdoc="{page}"></iframe>' for width in WIDTHS
    )
    (folder / "frames.html").write_text(f"<!doctype html><body>{frames}{PROBE}</body>")
    answer = re.search(r"<pre>(.*)</pre>", dumped(folder / "frames.html", folder / "profile"), re.DOTALL)
    assert answer, "the probe has not run"
    return json.loads(html.unescape(answer[1]))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the report looks like at each of WIDTHS."""
    return looked_at(render(full()), tmp_path_factory.mktemp("browser"))


def test_it_loads_without_an_error_and_every_picture_is_there(seen: list[dict[str, Any]]) -> None:
    assert [page["width"] for page in seen] == list(WIDTHS)
    for page in seen:
        assert page["errors"] == []
        assert page["images"] > 4 * 10 + 5 * 3 + 3 * 4 and page["broken"] == 0


def test_nothing_is_cut_off_and_no_text_is_tiny(seen: list[dict[str, Any]]) -> None:
    for page in seen:
        assert page["overflow"] <= 0 and page["cut"] == [], page["width"]
        assert page["small"] == 0


def test_tables_become_cards_on_a_phone(seen: list[dict[str, Any]]) -> None:
    assert [page["heads"] for page in seen] == [False, True]


def test_a_click_enlarges_a_picture_and_another_closes_it(seen: list[dict[str, Any]]) -> None:
    assert all(page["opened"] and page["closed"] for page in seen)


def test_runs_side_by_side_fit_a_phone_and_a_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "a-run/with_a_name_that_is_much_longer_than_names_should_be_on_a_telephone"
    pictures = {name: [(image, "class, key", "20.0 dB") for image in images(8)] for name in ("original", f"{long}_0")}
    monkeypatch.setattr(compare, "compare_reconstructions", lambda *_: (pictures, {"other": f"{long} is gone"}))
    monkeypatch.setattr(compare, "compare_samples", lambda *_: ({"class 1": pictures, "class 2": pictures}, {}))
    score = {"n": 10, "reference": f"{long}, sha256:1", "interval": [1.0, 2.0]}
    metrics = {key: ([1.0, 2.0], [3.0, 4.0]) for key in ("loss", "held_out/loss", "learning_rate")}
    runs = [
        compare.ComparedRun(
            Path(f"runs/{long}_{n}/evaluate"),
            *("", "evaluate", "done", 10**9),
            {"learning_rate": str(n), "data": f"{long}/{n}", "inputs.data": f"sha256:{n:064d}", "seed": "0"},
            metrics,
            {key: score | {"value": n + 1.5} for key in METRICS},
        )
        for n in range(5)
    ]
    broken = compare.ComparedRun(Path(f"runs/{long}"), problem=f"{long}: cannot be read")
    text = compare.render([*runs, broken], data="", images=8, samples=8, classes=2)
    phone, screen = looked_at(text, tmp_path)
    for page in (phone, screen):
        assert page["errors"] == [] and page["broken"] == 0 and page["images"] > 40
        assert page["overflow"] <= 0 and page["cut"] == [] and page["small"] == 0
        assert page["opened"] and page["closed"]
    assert phone["scrolls"] and not phone["wide"] and not phone["heads"] and screen["heads"]


def test_it_prints(tmp_path: Path) -> None:
    assert CHROMIUM is not None
    (tmp_path / "report.html").write_text(render(full()))
    out = tmp_path / "report.pdf"
    page = (tmp_path / "report.html").as_uri()
    profile = f"--user-data-dir={tmp_path}/profile"
    subprocess.run(
        [CHROMIUM, *QUIET, profile, f"--print-to-pdf={out}", page], capture_output=True, timeout=120, check=True
    )
    pages = len(re.findall(rb"/Type\s*/Page\b", out.read_bytes()))
    assert 3 <= pages <= 30
