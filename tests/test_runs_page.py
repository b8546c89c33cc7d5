"""docs/runs.md says what the code says."""

import re

from pipeline.errors import ExitCode
from pipeline.ray_runner import METRICS
from pipeline.run_log import FIELDS
from pipeline.run_report import TRANSIENT, FailedShard, RunReport
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "runs.md").read_text()


def rows(section: str) -> list[list[str]]:
    """Return the cells of a section's table, without its head."""
    text = re.search(rf"(?ms)^## {section}$(.*?)(?=^## |\Z)", PAGE)
    assert text, section
    lines = [line for line in text[1].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_metric_is_listed_as_it_is() -> None:
    listed = [tuple(row) for row in rows("Metrics")]

    assert listed == [
        (f"`{name}`", m.kind, f"`{m.tag}`" if m.tag else "", m.about) for name, m in METRICS.items()
    ]


def test_every_exit_code_is_listed() -> None:
    assert [int(row[0]) for row in rows("Exit codes")] == sorted(ExitCode)


def test_every_field_of_a_log_line_is_listed() -> None:
    named = [name for row in rows("Log") for name in re.findall(r"`(\w+)`", row[0])]

    assert tuple(named) == FIELDS


def test_every_key_of_a_summary_is_listed() -> None:
    named = {name for row in rows("Summary") for name in re.findall(r"`(\w+)`", row[0])}

    assert named == RunReport().to_json().keys()


def test_reasons_have_the_class_that_the_page_says() -> None:
    classes = {}
    for row in rows("What is tried again"):
        classes |= dict.fromkeys(re.findall(r"`(\w+)`", row[0]), row[1])
    classes = {reason: kind for reason, kind in classes.items() if kind != "-"}

    assert {reason for reason, kind in classes.items() if kind == "transient"} == TRANSIENT
    for reason, kind in classes.items():
        failure = FailedShard(shard="s", reason=reason, message="m", attempts=1)
        assert failure.error_class == kind
