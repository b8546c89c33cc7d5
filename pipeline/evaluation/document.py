"""HTML pages that need no other file: one style, pictures inside, no scripts, nothing fetched."""

import base64
import io
from collections.abc import Iterable
from html import escape

from PIL import Image


def document(title: str, parts: Iterable[str]) -> str:
    """Return a whole page, readable in light and dark.

    Args:
        title: of the window; text.
        parts: of the body; HTML.
    """
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"{body}\n</main>\n</body>\n</html>\n"
    )


def picture(image: Image.Image, *, alt: str, width: int) -> str:
    """Return an `img` element that holds its picture, at most `width` pixels wide."""
    width = min(width, image.width)
    height = max(1, round(image.height * width / image.width))
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    sink = io.BytesIO()
    image.save(sink, format="jpeg", quality=85)
    source = "data:image/jpeg;base64," + base64.b64encode(sink.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="{source}" width="{width}" height="{height}">'


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6570; --line: #dfe3e8;
  --page: #fbfbfa; --card: #ffffff; --accent: #2f6f9f; --front: #c2410c; --base: #0f766e;
  --faint: #a9b2bc; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ec; --soft: #9aa4af; --line: #30363d;
  --page: #14171a; --card: #1c2024; --accent: #6db1e0; --front: #fb923c; --base: #5eead4;
  --faint: #5c6670; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .75rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 0 0 .75rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p { max-width: 46rem; margin: 0 0 1rem; }
section { margin-top: 2.75rem; }
.note, small, dt { color: var(--soft); }
.note { font-size: .875rem; margin-top: .75rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: 1rem;
  padding: 0; margin: 1.5rem 0 0; list-style: none; }
.tiles li { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 1rem 1.15rem; }
.tiles b { display: block; font-size: 1.75rem; line-height: 1.2; }
.tiles span { color: var(--soft); font-size: .875rem; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; }
th, td { text-align: left; padding: .45rem .75rem .45rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 500; }
thead th { color: var(--soft); font-size: .8125rem; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar { width: 40%; padding-left: .75rem; vertical-align: middle; }
.bar span { display: block; height: .7rem; border-radius: 3px; background: var(--accent); }
code { font: .875em ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(28rem, 100%), 1fr));
  gap: 1.25rem; }
.row { display: flex; flex-wrap: wrap; gap: 1.25rem; align-items: flex-start; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  overflow: hidden; max-width: 100%; }
figure img { display: block; max-width: 100%; height: auto; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 2px; }
.pair img { width: 100%; }
figcaption { padding: .75rem 1rem 1rem; font-size: .9375rem; overflow-wrap: anywhere; }
dl { margin: .6rem 0 0; }
dt { font-size: .75rem; }
dd { margin: 0 0 .4rem; font-style: italic; font-size: .875rem; }
.wide { overflow-x: auto; }
.wide th, .wide td { overflow-wrap: normal; font-size: .8125rem; }
.wide tbody th { white-space: nowrap; }
details { border-bottom: 1px solid var(--line); padding: .5rem 0; }
summary { cursor: pointer; }
.heat { width: auto; font-size: .8125rem; }
.heat th, .heat td { padding: .25rem .6rem; border-bottom: 1px solid var(--page); }
.heat tbody th { white-space: nowrap; }
.heat td { text-align: right; font-variant-numeric: tabular-nums; color: #14171a; }
.heat td.none { color: var(--soft); }
svg { display: block; width: 100%; height: auto; font-size: 12px; }
svg text { fill: var(--ink); }
svg .soft { fill: var(--soft); }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .mark { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 5 4; }
svg .dot { fill: var(--faint); stroke: var(--faint); }
svg .dot.base { fill: var(--base); stroke: var(--base); }
svg .dot.front { fill: var(--front); stroke: var(--front); }
svg .curve { fill: none; stroke: var(--faint); stroke-width: 1.25; }
svg .curve.base { stroke: var(--base); stroke-width: 2; }
svg .curve.front { stroke: var(--front); stroke-width: 2; }
svg .hit { fill: none; stroke: transparent; stroke-width: 9; pointer-events: stroke; }
svg g.item:hover .dot { fill: var(--accent); stroke: var(--accent); }
svg g.item:hover .curve { stroke: var(--accent); stroke-width: 2.5; }
"""
