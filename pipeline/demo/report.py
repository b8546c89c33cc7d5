"""The demo's report: one HTML page that needs no other file."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

from pipeline.demo.overlay import data_uri, draw_kept_tokens
from pipeline.types import RejectedSample

FULL_BYTES = 2  # of a number of a full token: 16 bits, as a model would keep it
_EDGE = 336  # pixels of a picture on the page


@dataclass(frozen=True, kw_only=True, slots=True)
class CarvedPicture:
    """One image of the cache, with what the model says about it."""

    key: str
    caption: str
    image: Image.Image  # as the encoder saw it
    grid: tuple[int, int]  # rows, columns
    positions: Sequence[int]
    sizes: Sequence[float]
    bytes_in: int  # encoded image
    bytes_stored: int  # its tokens in the cache
    answers: tuple[str, str]  # from all tokens, from the carved ones


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoReport:
    """Everything on the page."""

    plugins: Mapping[str, str]  # kind -> name and options in words
    versions: Mapping[str, str]
    num_actors: int
    num_shards: int
    num_images: int  # carved
    bytes_in: int  # encoded images
    tokens_full: int
    tokens_kept: int
    width: int  # of a token
    bytes_tokens: int  # carved tokens as stored, with scales, positions and sizes
    bytes_files: int  # of all data files of the cache: also captions, checksums, indexes
    seconds: float  # from the first byte read to the last commit
    stage_seconds: Mapping[str, float]  # summed over threads and actors
    rejected: Sequence[RejectedSample]
    pictures: Sequence[CarvedPicture]

    @property
    def bytes_full(self) -> int:
        """What all tokens would take in 16 bits."""
        return self.tokens_full * self.width * FULL_BYTES

    @property
    def sizes(self) -> list[tuple[str, int]]:
        """What is compared, with its bytes."""
        return [
            ("images as they came, JPEG, PNG and WebP", self.bytes_in),
            (f"all {self.tokens_full:,} tokens in 16 bits", self.bytes_full),
            (f"the {self.tokens_kept:,} carved tokens as stored", self.bytes_tokens),
            ("data files of the cache, with captions and indexes", self.bytes_files),
        ]


def render(report: DemoReport) -> str:
    """Return the page: valid HTML, no scripts, no links to other files."""
    sections = (
        _headline(report),
        _size_table(report),
        _pictures(report),
        _speed(report),
        _rejected(report),
        _settings(report),
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>carve demo</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def megabytes(num_bytes: int) -> str:
    """Return a size in MB, in words: 1 MB is 1,000,000 bytes."""
    return f"{num_bytes / 1e6:.2f} MB"


def _headline(report: DemoReport) -> str:
    kept = report.tokens_kept / max(1, report.tokens_full)
    smaller = report.bytes_full / max(1, report.bytes_tokens)
    tiles = (
        (f"{report.num_images}", "images carved"),
        (f"{kept:.0%}", "of their tokens kept"),
        (f"{smaller:.1f} x", "smaller than all tokens in 16 bits"),
        (f"{len(report.rejected)}", "broken samples rejected"),
    )
    cells = "".join(f"<li><b>{escape(value)}</b><span>{name}</span></li>" for value, name in tiles)
    return (
        "<header><h1>What was carved</h1>\n<p>A corpus made on this machine was encoded once; the "
        "tokens that carry information were kept, packed and read back. The model has the shape of "
        "a LLaVA and <strong>untrained</strong> weights: sizes, speed and mechanics below are "
        "real, its choice of tokens and its words are not those of a trained model.</p>\n"
        f'<ul class="tiles">{cells}</ul></header>'
    )


def _size_table(report: DemoReport) -> str:
    largest = max(num_bytes for _, num_bytes in report.sizes)
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="n">{megabytes(num_bytes)}</td>'
        f'<td class="n">{num_bytes / max(1, report.num_images) / 1e3:.1f} kB</td>'
        f'<td class="bar">{_bar(num_bytes / max(1, largest))}</td></tr>'
        for name, num_bytes in report.sizes
    )
    return (
        "<section><h2>Sizes before and after</h2>\n<table><thead><tr><th></th>"
        '<th class="n">total</th><th class="n">per image</th><th></th></tr></thead>'
        f'<tbody>{rows}</tbody></table>\n<p class="note">A token of this model is {report.width} '
        "numbers wide. LLaVA-1.5-7B feeds 576 tokens of 4,096 numbers per image: 4.7 MB in 16 "
        "bits.</p></section>"
    )


def _pictures(report: DemoReport) -> str:
    figures = "".join(_figure(picture, report.width) for picture in report.pictures)
    return (
        "<section><h2>Kept tokens</h2>\n<p>Left, the image as the encoder saw it. Right, the "
        "tokens that stayed; the dark ones were dropped or merged. A framed token stands for as "
        "many source tokens as its number says: the others were merged into it. Below, what the "
        "untrained model writes about the image, from all tokens and from the carved ones.</p>\n"
        f'<div class="gallery">{figures}</div></section>'
    )


def _figure(picture: CarvedPicture, width: int) -> str:
    kept = draw_kept_tokens(picture.image, picture.grid, picture.positions, picture.sizes)
    num_full = picture.grid[0] * picture.grid[1]
    num_kept = len(picture.positions)
    full, carved = (escape(answer) for answer in picture.answers)
    caption = escape(picture.caption)
    bytes_full = num_full * width * FULL_BYTES
    return (
        f'<figure><div class="pair">{_img(picture.image, caption)}{_img(kept, "its kept tokens")}'
        f"</div><figcaption><code>{escape(picture.key)}</code> {caption}<br>"
        f"<small>{picture.bytes_in / 1e3:.1f} kB of image, {num_full} tokens of "
        f"{bytes_full / 1e3:.1f} kB, {num_kept} kept in {picture.bytes_stored / 1e3:.1f} kB</small>"
        f"<dl><dt>untrained model, {num_full} tokens</dt><dd>{full}</dd>"
        f"<dt>untrained model, {num_kept} carved tokens</dt><dd>{carved}</dd></dl>"
        "</figcaption></figure>"
    )


def _img(image: Image.Image, alt: str) -> str:
    source = data_uri(image, edge=_EDGE)
    return f'<img alt="{alt}" src="{source}" width="{_EDGE}" height="{_EDGE}">'


def _speed(report: DemoReport) -> str:
    longest = max(report.stage_seconds.values(), default=0.0)
    rows = "".join(
        f'<tr><th scope="row">{escape(stage)}</th><td class="n">{seconds:.2f} s</td>'
        f'<td class="bar">{_bar(seconds / max(1e-9, longest))}</td></tr>'
        for stage, seconds in sorted(report.stage_seconds.items(), key=lambda item: -item[1])
    )
    rate = report.num_images / max(1e-9, report.seconds)
    return (
        f"<section><h2>Speed</h2>\n<p><b>{rate:.1f} images a second</b> on {report.num_actors} "
        f"processes of this machine: {report.seconds:.1f} s from the first byte read to the last "
        "commit, without the start of Ray and of the processes. Seconds by stage are summed over "
        "threads and processes, which work at the same time.</p>\n<table><tbody>"
        f"{rows}</tbody></table></section>"
    )


def _rejected(report: DemoReport) -> str:
    reasons = Counter(sample.reason for sample in report.rejected)
    summary = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    rows = "".join(
        f"<tr><td><code>{escape(s.key)}</code></td><td>{escape(s.stage)}</td>"
        f"<td>{escape(s.reason)}</td><td>{escape(s.message)}</td></tr>"
        for s in report.rejected
    )
    return (
        "<section><h2>Rejected samples</h2>\n<p>The corpus holds a few samples that are broken on "
        "purpose. Each costs itself alone and is recorded with its reason in the cache"
        f"{': ' + escape(summary) if summary else ''}.</p>\n<table><thead><tr><th>key</th><th>stage"
        f"</th><th>reason</th><th>message</th></tr></thead><tbody>{rows}</tbody></table></section>"
    )


def _settings(report: DemoReport) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in (*report.plugins.items(), *report.versions.items())
    )
    return (
        f"<section><h2>Settings and versions</h2>\n<table><tbody>{rows}</tbody></table></section>"
    )


def _bar(share: float) -> str:
    return f'<span style="width:{max(0.004, share):.1%}"></span>'


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6570; --line: #dfe3e8;
  --page: #fbfbfa; --card: #ffffff; --accent: #2f6f9f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ec; --soft: #9aa4af; --line: #30363d;
  --page: #14171a; --card: #1c2024; --accent: #6db1e0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .75rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 0 0 .75rem; }
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
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  overflow: hidden; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 2px; }
.pair img { display: block; width: 100%; height: auto; }
figcaption { padding: .75rem 1rem 1rem; font-size: .9375rem; }
dl { margin: .6rem 0 0; }
dt { font-size: .75rem; }
dd { margin: 0 0 .4rem; font-style: italic; font-size: .875rem; }
"""
