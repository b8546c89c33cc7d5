"""The page that `fidelity.py` writes: every figure comes from the tables of the run.

What stands between the two marks is written by hand, and a rerun keeps it.
"""

from collections.abc import Mapping
from typing import Any

from fidelity_groups import CALIBRATED
from fidelity_online import CODEC
from fidelity_results import Results
from fidelity_sentences import sentences
from fidelity_tables import own_tables

from pipeline.evaluation.markdown import render_markdown, render_table
from pipeline.evaluation.page import render_page

BEGIN, END = "<!-- by hand: begin -->", "<!-- by hand: end -->"
_UNWRITTEN = "Not written yet."


def render(results: Results, facts: Mapping[str, Any], known: str) -> str:
    """Return the page as Markdown.

    Args:
        results: of all groups.
        facts: about the run.
        known: the page as it was, or "".
    """
    parts = [
        "# Fidelity: what carving costs",
        _intro(facts),
        "## What this means",
        f"{BEGIN}\n{by_hand(known)}\n{END}",
        "## In numbers",
        sentences(results),
        "\n\n".join(render_table(table) for table in own_tables(results)),
        "## All carvers",
        f"At each budget all carvers, stored as {CODEC}, on the same questions.",
        render_markdown(results.compared).strip(),
        "## How it is measured",
        _method(facts),
    ]
    return "\n\n".join(parts) + "\n"


def render_plots(results: Results) -> str:
    """Return the plots as one HTML page."""
    return render_page(results.compared)


def by_hand(known: str) -> str:
    """Return what stands between the marks of a page."""
    _, begun, rest = known.partition(BEGIN)
    text, ended, _ = rest.partition(END)
    return text.strip() if begun and ended else _UNWRITTEN


def _intro(facts: Mapping[str, Any]) -> str:
    questions = ", ".join(f"{family} {count:,}" for family, count in facts["questions"].items())
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        "Written by this command; by hand only what stands under *What this means*:",
        "\n    python benchmarks/fidelity.py --work-dir DIR --write-page\n",
        f"- {facts['hardware']}",
        f"- {versions}",
        f"- {facts['date']}; weights `{facts['model'][:16]}`, of `benchmarks/yardstick/train.py`",
        f"- {facts['images']:,} pictures that training never saw (seed "
        f"`{facts['seeds']['pictures']}`), questions: {questions}",
        f"- every interval: 95 %, bootstrap over pictures, {facts['resamples']:,} resamples, seed "
        f"{facts['seeds']['bootstrap']}; every difference is paired",
    ]
    if facts["training"]:
        right = facts["training"]["heldout_accuracy"]
        said = ", ".join(f"{family} {value:.1%}" for family, value in right.items())
        lines.append(f"- the model's own accuracy when its training ended, held out: {said}")
    return "\n".join(lines)


def _method(facts: Mapping[str, Any]) -> str:
    values = [
        f"`{entry.split()[0]}` {CALIBRATED[entry.split()[0]]} = "
        f"{', '.join(f'{value:.4g}' for value in found)}"
        for entry, found in facts["calibrated"].items()
        if entry.endswith(facts["model"])
    ]
    calibrated = (
        f"Calibrated as `carve calibrate` does, for each budget on {facts['sample_images']} other "
        f"pictures (seed `{facts['seeds']['calibration']}`): {'; '.join(values)}. "
        if values
        else ""
    )
    return (
        "Pictures are encoded once in each group, features behind the projector; each carver "
        "works at each budget, its tokens are packed, read back and handed to the model, which "
        f"answers greedily (`{facts['template']}`). An answer is right if it equals the only right "
        "one. Carvers have their default options unless named. Signals of the language model come "
        f"from the prompt `{facts['neutral_prompt']}`: no question is known. {calibrated}"
        "Carving times are those of one thread of a busy machine. Stability is that of the first "
        "64 pictures, which are scenes. One small model on drawn pictures: what wins here need not "
        "win on yours; `carve evaluate` tells."
    )
