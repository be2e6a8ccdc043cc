"""The documents as a site: a strict build, no network, every picture in the gallery, and pages that fit a phone."""

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.browser import CHROMIUM, dumped

ROOT = Path(__file__).parents[1]
WIDTHS = (400, 1400)
IN_BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; .ci/run installs one")
# What a browser loads by itself: scripts, styles and pictures; links that a reader may follow are not among it.
LOADED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=[\"']?([^\"'\s>]+)")
PROBE = """
<script>
addEventListener('load', () => setTimeout(() => {
  const found = [...document.querySelectorAll('iframe')].map(frame => {
    const page = frame.contentDocument, root = page.documentElement, edge = root.clientWidth + 1;
    const all = [...page.querySelectorAll('article *')], scrolls = '.md-typeset__scrollwrap, pre, .headerlink';
    const cut = all.filter(e => !e.closest(scrolls) && e.getBoundingClientRect().right > edge);
    return {page: frame.dataset.name, width: root.clientWidth, overflow: root.scrollWidth - root.clientWidth,
      cut: cut.map(e => e.outerHTML.slice(0, 80)),
      broken: [...page.images].filter(i => !i.naturalWidth).map(i => i.src),
      matches: page.querySelectorAll('.md-search-result__item').length};
  });
  document.body.replaceChildren(Object.assign(document.createElement('pre'), {textContent: JSON.stringify(found)}));
}, 3000));
</script>
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="pip install 'vqscale[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    return folder


def test_the_environment_of_the_tests_builds_the_site() -> None:
    """So that the tests below do not vanish where they should run."""
    setup = re.search(r"--editable '\.\[([\w,]+)\]'", (ROOT / "Makefile").read_text())
    assert setup and "docs" in setup[1].split(",")
    assert "make setup" in (ROOT / ".ci" / "run").read_text()


def test_every_document_is_a_page_and_the_readme_is_the_first(site: Path) -> None:
    pages = [path.with_suffix(".html").name for path in (ROOT / "docs").glob("*.md")]
    assert [name for name in pages if not (site / name).is_file()] == []
    assert "Your own images" in (site / "index.html").read_text()


def test_a_browser_needs_no_network_for_any_page(site: Path) -> None:
    outside = {
        f"{page.name}: {address}"
        for page in site.rglob("*.html")
        for address in LOADED.findall(page.read_text())
        if re.match(r"https?:|//", address)
    }
    assert outside == set()
    styles = [path.read_text() for path in site.rglob("*.css")]
    assert [style for style in styles if re.search(r"url\([\"']?(https?:|//)|@import", style)] == []


def test_links_to_files_of_the_repository_lead_to_copies(site: Path) -> None:
    assert 'href="examples/quickstart.py"' in (site / "api.html").read_text()
    assert (site / "examples" / "quickstart.py").read_bytes() == (ROOT / "examples" / "quickstart.py").read_bytes()


def test_the_reference_has_the_docstrings_of_the_api(site: Path) -> None:
    text = html.unescape(re.sub(r"<[^>]+>", "", (site / "reference.html").read_text()))
    text = " ".join(text.split())
    for words in ("from_pretrained", "A trained VQ-VAE", "samples_per_class", "one int64 [n, h, w] per level"):
        assert words in text, words


def test_the_search_knows_every_page(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text())
    found = {entry["location"].split("#")[0] for entry in index["docs"]}
    assert {path.with_suffix(".html").name for path in (ROOT / "docs").glob("*.md")} <= found


def test_the_gallery_has_every_picture_under_its_command() -> None:
    text = (ROOT / "docs" / "gallery.md").read_text()
    pictures = re.findall(r"!\[[^]]+\]\(images/([\w.-]+)\)", text)
    assert sorted(pictures) == sorted(path.name for path in (ROOT / "docs" / "images").iterdir())
    parts = re.split(r"!\[[^]]+\]\([^)]+\)", text)[:-1]
    assert all(re.search(r"^    (vqscale|python|make) ", part, re.MULTILINE) for part in parts)


@pytest.fixture(scope="module")
def seen(site: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every page looks like at each of WIDTHS, opened as a file; the first with a word to search for."""
    pages = [path.relative_to(site).as_posix() for path in sorted(site.rglob("*.html")) if path.name != "404.html"]
    frames = "".join(
        f'<iframe width="{width}" height="900" style="border:0" data-name="{page}" src="{page}"></iframe>'
        for page in pages
        for width in WIDTHS
    )
    frames = frames.replace('src="index.html"', 'src="index.html?q=perplexity"')
    (site / "frames.html").write_text(f"<!doctype html><body>{frames}{PROBE}</body>")
    profile = tmp_path_factory.mktemp("profile")
    answer = re.search(r"<pre>(.*)</pre>", dumped(site / "frames.html", profile, "--allow-file-access-from-files"))
    assert answer, "the probe has not run"
    return json.loads(html.unescape(answer[1]))


@IN_BROWSER
def test_every_page_fits_a_phone_and_a_screen(seen: list[dict[str, Any]]) -> None:
    assert len(seen) > 2 * 20 and {page["width"] for page in seen} == set(WIDTHS)
    assert [page for page in seen if page["overflow"] > 0 or page["cut"] or page["broken"]] == []


@IN_BROWSER
def test_the_search_finds_without_a_server(seen: list[dict[str, Any]]) -> None:
    assert [page["matches"] > 1 for page in seen if page["page"] == "index.html"] == [True, True]
