"""Carved images side by side, as one HTML page or one PNG."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.evaluation.document import document, picture
from pipeline.evaluation.drawing import (
    Panel,
    PanelRow,
    SeenImage,
    count_tokens,
    draw_image,
    draw_sheet,
    draw_tokens,
)

LEGEND = (
    "Bright tokens were kept; a number says how many source tokens one stands for. Tokens that did "
    "not stay are dim where all of them were merged into kept ones, and dark where they were "
    "dropped. Where a carver does both, it does not say which of the two befell a token: all of "
    "them are dark, and their numbers stand above the picture."
)
_SEEN = "as the model saw it"
_WIDTH = 576  # pixels of a picture of one view on a page
_WIDE = 1160  # of several views
_SHEET = 2400  # pixels of a row of panels, or one panel where that is wider


@dataclass(frozen=True, kw_only=True, slots=True)
class Carving:
    """What one carver left of an image."""

    name: str
    note: str  # options, say
    positions: Sequence[int]
    sizes: Sequence[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownImage:
    """One image and what carvers left of it."""

    name: str
    note: str
    seen: SeenImage
    carvings: Sequence[Carving]

    def panels(self) -> Iterator[Panel]:
        """Yield the image, then each carving of it."""
        total = self.seen.num_tokens
        yield Panel(title=_SEEN, note=f"{total} tokens", image=draw_image(self.seen))
        for carving in self.carvings:
            counts = count_tokens(total, carving.sizes)
            yield Panel(
                title=carving.name,
                note="; ".join(filter(None, [str(counts), carving.note])),
                image=draw_tokens(self.seen, carving.positions, carving.sizes),
            )


def check_output(output: Path) -> None:
    """Refuse a file that is neither a page nor a picture, before work is spent on it.

    Raises:
        ConfigError: naming the suffixes there are.
    """
    if output.suffix.lower() not in _WRITERS:
        known = ", ".join(_WRITERS)
        raise ConfigError(f"--output {output}: the suffix must be one of {known}")


def write_shown(shown: Sequence[ShownImage], output: Path) -> None:
    """Write one HTML page or one PNG of all images, by the file's suffix.

    Raises:
        ConfigError: another suffix, or the file cannot be written.
    """
    check_output(output)
    content = _WRITERS[output.suffix.lower()](shown)
    try:
        output.write_bytes(content)
    except OSError as err:
        raise ConfigError(f"cannot write --output {output}: {err.strerror}") from err


def render_shown(shown: Sequence[ShownImage]) -> str:
    """Return the page."""
    header = f"<header><h1>Carved tokens</h1>\n<p>{LEGEND}</p></header>"
    return document("carve show", [header, *(_section(image) for image in shown)])


def _section(shown: ShownImage) -> str:
    figures = "".join(_figure(panel, shown.seen) for panel in shown.panels())
    note = f'<p class="note">{escape(shown.note)}</p>' if shown.note else ""
    return (
        f"<section><h2><code>{escape(shown.name)}</code></h2>{note}"
        f'<div class="row">{figures}</div></section>'
    )


def _figure(panel: Panel, seen: SeenImage) -> str:
    width = min(panel.image.width, _WIDTH if len(seen.views) == 1 else _WIDE)
    return (
        f'<figure style="width:{width + 2}px"><figcaption>{escape(panel.title)}<br>'
        f"<small>{escape(panel.note)}</small></figcaption>"
        f"{picture(panel.image, alt=panel.title, width=width)}</figure>"
    )


def _page(shown: Sequence[ShownImage]) -> bytes:
    return render_shown(shown).encode()


def _sheet(shown: Sequence[ShownImage]) -> bytes:
    sink = io.BytesIO()
    draw_sheet([row for image in shown for row in _rows(image)]).save(sink, format="png")
    return sink.getvalue()


def _rows(shown: ShownImage) -> Iterator[PanelRow]:
    """Yield the panels of an image, as many a row as fit, the first under the image's name."""
    panels = list(shown.panels())
    at_once = max(1, _SHEET // panels[0].image.width)
    for start in range(0, len(panels), at_once):
        heading = "" if start else "; ".join(filter(None, [shown.name, shown.note]))
        yield PanelRow(panels=panels[start : start + at_once], heading=heading)


_WRITERS = {".html": _page, ".htm": _page, ".png": _sheet}
