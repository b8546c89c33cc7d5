"""The demo's report: one HTML page that needs no other file."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from pipeline.evaluation.document import document, picture
from pipeline.evaluation.drawing import SeenImage, draw_tokens
from pipeline.types import RejectedSample

FULL_BYTES = 2  # of a number of a full token: 16 bits, as a model would keep it
_EDGE = 336  # pixels of a picture on the page


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the model answers to a question."""

    prompt: str
    wanted: str
    full: str  # from all tokens
    carved: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CarvedPicture:
    """One image of the cache, with what the model answers about it."""

    key: str
    caption: str
    image: SeenImage  # as the encoder saw it
    positions: Sequence[int]
    sizes: Sequence[float]
    bytes_in: int  # encoded image
    bytes_stored: int  # its tokens in the cache
    answers: Sequence[Answer]


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
    answers: Sequence[Answer]  # to all that was asked
    pictures: Sequence[CarvedPicture]

    @property
    def right_full(self) -> int:
        """Questions answered right from all tokens."""
        return sum(answer.full == answer.wanted for answer in self.answers)

    @property
    def right_carved(self) -> int:
        """Questions answered right from the carved tokens."""
        return sum(answer.carved == answer.wanted for answer in self.answers)

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
    return document("carve demo", sections)


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
        (
            f"{report.right_carved} of {len(report.answers)}",
            f"questions answered right; {report.right_full} from all tokens",
        ),
        (f"{len(report.rejected)}", "broken samples rejected"),
    )
    cells = "".join(f"<li><b>{escape(value)}</b><span>{name}</span></li>" for value, name in tiles)
    return (
        "<header><h1>What was carved</h1>\n<p>A corpus made on this machine was encoded once; the "
        "tokens that carry information were kept, packed and read back. The model is a LLaVA of 5 "
        "million parameters, trained on pictures with questions like those below, and on nothing "
        "else.</p>\n"
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
    figures = "".join(_figure(shown, report.width) for shown in report.pictures)
    return (
        "<section><h2>Kept tokens</h2>\n<p>Left, the image as the encoder saw it. Right, the "
        "tokens that stayed; the dark ones were dropped or merged. A framed token stands for as "
        "many source tokens as its number says: the others were merged into it. Where the model "
        "was asked, its answers from all tokens and from the carved ones stand below.</p>\n"
        f'<div class="gallery">{figures}</div></section>'
    )


def _figure(shown: CarvedPicture, width: int) -> str:
    kept = draw_tokens(shown.image, shown.positions, shown.sizes)
    num_full, num_kept = shown.image.num_tokens, len(shown.positions)
    bytes_full = num_full * width * FULL_BYTES
    seen = picture(shown.image.views[0], alt=shown.caption, width=_EDGE)
    drawn = picture(kept, alt="its kept tokens", width=_EDGE)
    return (
        f'<figure><div class="pair">{seen}{drawn}'
        f"</div><figcaption><code>{escape(shown.key)}</code> {escape(shown.caption)}<br>"
        f"<small>{shown.bytes_in / 1e3:.1f} kB of image, {num_full} tokens of "
        f"{bytes_full / 1e3:.1f} kB, {num_kept} kept in {shown.bytes_stored / 1e3:.1f} kB</small>"
        f"{_answer_table(shown.answers)}</figcaption></figure>"
    )


def _answer_table(answers: Sequence[Answer]) -> str:
    if not answers:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(answer.prompt)}?</th>'
        f"{_answer_cell(answer.full, answer)}{_answer_cell(answer.carved, answer)}</tr>"
        for answer in answers
    )
    return (
        "<table><thead><tr><th></th><th>all tokens</th><th>carved</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def _answer_cell(said: str, answer: Answer) -> str:
    if said == answer.wanted:
        return f"<td>{escape(said)} \N{CHECK MARK}</td>"
    return f'<td title="right: {escape(answer.wanted)}">{escape(said)} \N{BALLOT X}</td>'


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
