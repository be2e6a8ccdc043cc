"""The report's page: CSS, a few lines of script, and helpers that make safe HTML.

In: text and image bytes.  Out: HTML that holds all it shows: no network, readable at 400 px, at 1400 px and on paper.
"""

import base64
from collections.abc import Iterable, Sequence
from html import escape

CSS = """
:root { --paper:#fbfaf8; --card:#ffffff; --ink:#1f2a37; --muted:#667080; --line:#e2e5ea; --accent:#2b5c8a;
  --good:#3d7352; --warn:#a5602b; }
@media (prefers-color-scheme: dark) { :root { --paper:#14181d; --card:#1c2229; --ink:#e6e9ed; --muted:#98a2af;
  --line:#303843; --accent:#8db8de; --good:#86c39c; --warn:#dfa374; } }
* { box-sizing:border-box; }
html { -webkit-text-size-adjust:100%; scroll-behavior:smooth; }
body { margin:0; overflow-wrap:anywhere; background:var(--paper); color:var(--ink);
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif; }
main, header.top { max-width:1180px; margin:0 auto; padding:0 20px; }
header.top { padding-top:36px; }
h1 { font-size:1.75rem; line-height:1.2; margin:0 0 4px; letter-spacing:-.01em; overflow-wrap:anywhere; }
h2 { font-size:1.2rem; margin:44px 0 6px; padding-top:14px; border-top:1px solid var(--line); }
h3 { font-size:.95rem; margin:18px 0 6px; overflow-wrap:anywhere; }
p { margin:0 0 12px; max-width:76ch; }
.muted, .note { color:var(--muted); } .note { font-size:.88rem; }
nav { display:flex; flex-wrap:wrap; gap:4px 16px; margin:14px 0 4px; font-size:.9rem; }
a { color:var(--accent); text-decoration:none; } a:hover { text-decoration:underline; }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(150px,1fr)); gap:12px; margin:22px 0 0; }
.tile { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:12px 14px; }
.tile b { display:block; font-size:1.45rem; font-weight:600; font-variant-numeric:tabular-nums; line-height:1.25; }
.tile span { color:var(--muted); font-size:.82rem; display:block; line-height:1.35; }
table { width:100%; border-collapse:collapse; font-size:.88rem; background:var(--card); }
.card { background:var(--card); border:1px solid var(--line); border-radius:10px; overflow:hidden; }
th, td { text-align:left; vertical-align:top; padding:8px 12px; border-bottom:1px solid var(--line);
  overflow-wrap:anywhere; }
tbody tr:last-child td { border-bottom:0; }
th { font-weight:600; color:var(--muted); font-size:.8rem; white-space:nowrap; }
td.value, td.count { font-variant-numeric:tabular-nums; white-space:nowrap; width:6em; }
td.value { font-weight:600; } td.name { font-weight:600; width:17em; } td.text { min-width:12em; }
.line { display:block; font-weight:400; }
code, .hash { font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace; font-size:.86em; }
.yes { color:var(--good); font-weight:600; } .no { color:var(--warn); font-weight:600; }
.class { display:grid; grid-template-columns:112px 1fr; gap:10px; align-items:center; padding:7px 0;
  border-bottom:1px solid var(--line); break-inside:avoid; }
.class h3 { margin:0; font-weight:500; }
.strip { display:grid; grid-template-columns:repeat(auto-fit,minmax(72px,96px)); gap:5px; }
.trios { display:grid; grid-template-columns:repeat(auto-fill,minmax(250px,1fr)); gap:14px; margin-top:10px; }
figure { margin:0; break-inside:avoid; } figcaption { font-size:.8rem; color:var(--muted); padding-top:3px; }
.trio div { display:grid; grid-template-columns:repeat(3,1fr); gap:3px; }
.near div { display:grid; grid-template-columns:repeat(4,1fr); gap:3px; }
.near button:first-child { padding-right:6px; border-right:2px solid var(--accent); }
ul { margin:4px 0 12px; padding-left:1.2em; font-size:.88rem; color:var(--muted); max-width:76ch; }
.plots { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,430px),1fr)); gap:16px; margin-top:10px; }
.plots img { width:100%; background:#fff; border:1px solid var(--line); border-radius:10px; padding:8px; }
button.zoom { display:block; width:100%; padding:0; border:0; background:none; cursor:zoom-in; }
button.zoom img { display:block; width:100%; height:auto; border-radius:4px; image-rendering:pixelated; }
button.zoom:focus-visible { outline:2px solid var(--accent); outline-offset:2px; border-radius:4px; }
dialog { border:0; padding:0; background:transparent; max-width:96vw; max-height:96vh; }
dialog::backdrop { background:rgba(10,14,20,.82); }
dialog img { display:block; width:min(92vw,92vh,768px); image-rendering:pixelated; border-radius:6px; cursor:zoom-out; }
details { border:1px solid var(--line); border-radius:10px; background:var(--card); padding:8px 14px; margin:8px 0; }
summary { cursor:pointer; overflow-wrap:anywhere; }
pre { overflow-x:auto; font-size:.8rem; line-height:1.45; margin:10px 0 4px; white-space:pre-wrap;
  overflow-wrap:anywhere; }
footer { max-width:1180px; margin:48px auto 0; padding:14px 20px 40px; color:var(--muted); font-size:.85rem; }
@media (max-width:760px) {
  .wide thead { display:none; }
  .wide tr { display:block; padding:10px 0; border-bottom:1px solid var(--line); }
  .wide tbody tr:last-child { border-bottom:0; }
  .wide td { display:flex; gap:12px; justify-content:space-between; border:0; padding:2px 14px; text-align:right; }
  .wide td::before { content:attr(data-label); color:var(--muted); text-align:left; flex:0 0 34%; font-weight:400; }
  .wide td.name { font-size:1rem; text-align:left; } .wide td.name::before { content:none; }
  .wide td:empty { display:none; } .wide td.value, .wide td.count, .wide td.name { width:auto; white-space:normal; }
  .class { grid-template-columns:1fr; gap:4px; }
  .strip { grid-template-columns:repeat(auto-fill,minmax(60px,1fr)); }
}
@media print {
  :root { --paper:#fff; --card:#fff; --ink:#000; --muted:#444; --line:#ccc; --accent:#000; --good:#000; --warn:#000; }
  body { font-size:10.5pt; } nav, dialog { display:none; } main, header.top, footer { max-width:none; padding:0; }
  h2 { break-after:avoid; } tr, .tile, .class, .trio, .near { break-inside:avoid; } table { font-size:8pt; }
  th, td { padding:3px 6px; }
  * { -webkit-print-color-adjust:exact; print-color-adjust:exact; }
}
"""

SCRIPT = """
const box = document.querySelector('dialog');
document.addEventListener('click', event => {
  const image = event.target.closest('button.zoom img');
  if (image) { const big = box.querySelector('img'); big.src = image.src; big.alt = image.alt; box.showModal(); }
  else if (box.open) box.close();
});
"""


def data_uri(data: bytes, kind: str) -> str:
    """Bytes as an address that needs no network. kind: png | svg."""
    mime = {"png": "image/png", "svg": "image/svg+xml"}[kind]
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def zoomable(png: bytes, alt: str) -> str:
    """An image that a click or Enter enlarges."""
    text = escape(alt, quote=True)
    return f'<button class="zoom" title="{text}"><img src="{data_uri(png, "png")}" alt="{text}"></button>'


def plot(svg: bytes, alt: str) -> str:
    """A chart."""
    return f'<figure><img src="{data_uri(svg, "svg")}" alt="{escape(alt, quote=True)}"></figure>'


def tile(value: str, label: str) -> str:
    """One number, large."""
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>'


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, value_column: int | None = 1) -> str:
    """A table whose rows become cards on narrow screens. Cells are HTML already; the first is the row's name."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{_cells(columns, row, value_column)}</tr>" for row in rows)
    return f'<div class="card"><table class="wide"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cells(columns: Sequence[str], row: Sequence[str], value_column: int | None) -> str:
    kinds = {0: "name", value_column: "value"}
    made = []
    for n, (column, cell) in enumerate(zip(columns, row, strict=True)):
        kind = kinds.get(n, "count" if column == "n" else "text")
        # One element per cell: on narrow screens a cell is a flex box of its heading and this.
        content = f"<div>{cell}</div>" if cell else ""
        made.append(f'<td class="{kind}" data-label="{escape(column)}">{content}</td>')
    return "".join(made)


def section(title: str, body: str, note: str = "") -> tuple[str, str]:
    """(anchor, HTML) of one part of the page."""
    anchor = title.lower().replace(" ", "-")
    lead = f'<p class="note">{escape(note)}</p>' if note else ""
    return anchor, f'<section id="{anchor}"><h2>{escape(title)}</h2>{lead}{body}</section>'


def page(title: str, subtitle: str, tiles: str, sections: Sequence[tuple[str, str]], footer: str) -> str:
    """The whole document."""
    names = {anchor: escape(anchor.replace("-", " ").capitalize()) for anchor, _ in sections}
    links = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name in names.items())
    body = "\n".join(html for _, html in sections)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"><title>{escape(title)}</title>
<style>{CSS}</style></head>
<body><header class="top"><h1>{escape(title)}</h1><p class="muted">{escape(subtitle)}</p><nav>{links}</nav>
<div class="tiles">{tiles}</div></header>
<main>
{body}
</main><footer>{escape(footer)}</footer><dialog><img alt=""></dialog>
<script>{SCRIPT}</script></body></html>
"""
