"""A hook of mkdocs: files of the repository that documents link to become part of the site.

In: docs/*.md and README.md, whose links are relative to where they lie, as a code host follows them.  Out: the README
as index.md, each file outside of docs/ that is linked to under its path in the repository, links that fit.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
INDEX = "README.md"


def _target(page: str, link: str) -> str:
    """A link of a page, both as paths in the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def _in_site(path: str) -> str:
    """Where a file of the repository lies in the site's sources."""
    return "index.md" if path == INDEX else path.removeprefix("docs/")


def _linked(pages: list[str]) -> set[str]:
    """Files outside of docs/ that these pages link to, and those which such pages link to in turn."""
    reached: set[str] = set()
    while pages:
        page = pages.pop()
        links = {_target(page, link) for link in LINK.findall((ROOT / page).read_text(encoding="utf-8"))}
        new = {path for path in links - reached if not path.startswith("docs/") and (ROOT / path).is_file()}
        reached |= new
        pages += [path for path in new if path.endswith(".md")]
    return reached


def on_files(files: Files, config: Any) -> Files:
    """Add the README and what is linked to. A link to a file that does not exist is left to mkdocs to report."""
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    for path in sorted({INDEX} | _linked([INDEX, *pages])):
        files.append(File.generated(config, _in_site(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Make links that are relative to the repository relative to the site."""
    source = Path(page.file.abs_src_path).relative_to(ROOT).as_posix()
    here = posixpath.dirname(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        return "](" + posixpath.relpath(_in_site(_target(source, match[1])), here or ".")

    return LINK.sub(rewritten, markdown)
