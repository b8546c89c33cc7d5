"""The pages say what is true: links lead somewhere, and what they name is in the code."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from click import Command
from pydantic import BaseModel

from pipeline.cli import app
from pipeline.config import JobConfig
from pipeline.errors import ExitCode
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
COMMANDS: dict[str, Command] = typer.main.get_command(app).commands
# Of the nightly job, or of a shell, beside those of a run.
OTHER_CODES = {1, 137}
OF_A_RUN = {"config"}  # ends it with 2; no shard fails for it
# Calls whose first or second argument is a reason, beside every keyword `reason`.
REASONED = {"_fail", "_rejected", "_lose", "_retry", "_give_up"}


def anchors(text: str) -> set[str]:
    """Return the names that GitHub gives a page's headings."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", outside, re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", h.lower()).strip() for h in headings]
    return {heading.replace(" ", "-") for heading in plain}


def section(heading: str) -> str:
    return re.split(r"^#+ ", OPERATIONS.split(f"## {heading}\n")[1], flags=re.MULTILINE)[0]


def first_cells(heading: str) -> list[str]:
    rows = re.findall(r"^\| (.*?) \|", section(heading), re.MULTILINE)
    return [
        row for row in rows if not row.startswith("--") and row not in ("code", "reason", "symptom")
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_leads_to_a_file_and_a_heading_of_it(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    broken = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)

    assert broken == []


def test_the_exit_codes_are_those_of_the_code() -> None:
    named = {int(code) for code in first_cells("Exit codes")}

    assert named >= {int(code) for code in ExitCode}
    assert named - {int(code) for code in ExitCode} <= OTHER_CODES


def reasons(path: Path) -> Iterator[str]:
    """Yield the reasons of shards and samples that a module gives, as far as they are constants."""
    for node in ast.walk(ast.parse(path.read_text())):
        found: list[ast.expr] = []
        if isinstance(node, ast.keyword) and node.arg == "reason":
            found = [node.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            found = node.args[:2] if node.func.attr in REASONED else []
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
            found = node.value.elts if path.parent.name in ("source", "ray_runner") else []
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith(".retries"):
            found = [node.slice]
        for value in found:
            text = value.value if isinstance(value, ast.Constant) else None
            if isinstance(text, str) and re.fullmatch(r"[a-z]+(_[a-z0-9]+)*", text):
                yield text


def texts(path: Path) -> Iterator[str]:
    """Yield the strings of a module, with ... for what is put into them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else "..." for p in node.values]
            yield "".join(str(part) for part in parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_reason_that_the_code_gives_is_explained() -> None:
    folders = ("source", "encoders", "ray_runner")
    modules = [*(ROOT / "pipeline").glob("*.py")]
    modules += [path for f in folders for path in (ROOT / "pipeline" / f).glob("*.py")]
    given = {reason for path in modules for reason in reasons(path)}
    cells = first_cells("Reasons a shard fails") + first_cells("Reasons a sample is rejected")
    explained = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}

    assert {"truncated", "actor_lost", "storage", "corrupt_image", "bad_key"} <= given
    assert given - explained <= OF_A_RUN, "explain it in docs/operations.md"
    assert explained - {text for path in modules for text in texts(path)} == set()


def test_every_option_in_an_example_of_ours_is_one_the_command_has() -> None:
    calls = re.findall(r"\bcarve ([a-z]+)\b([^\n`;|#]*)", OPERATIONS)
    unknown = [
        f"carve {command} {option}"
        for command, rest in calls
        if command in COMMANDS
        for option in re.findall(r"(?<!\S)--[a-z-]+", rest)
        if option not in {name for p in COMMANDS[command].params for name in p.opts}
    ]
    everywhere = {name for c in COMMANDS.values() for p in c.params for name in p.opts}
    alone = set(re.findall(r"`(--[a-z-]+)[` ]", OPERATIONS))

    assert {command for command, _ in calls} >= {"run", "plan", "status", "verify", "gc"}
    assert unknown == []
    assert alone - everywhere == set()


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")


def test_every_key_of_a_config_that_operations_names_is_one() -> None:
    named = set(re.findall(r"`((?:input|output|runner|notify)\.\w+)", OPERATIONS))

    assert len(named) > 10
    assert named - {*keys(JobConfig)} == set()


def test_the_messages_that_operations_quotes_are_said_by_the_code() -> None:
    cells = first_cells("Something is wrong")
    quoted = [q for cell in cells for q in re.findall(r"`([^`]+)`", cell) if " " in q]
    modules = [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "jobs").glob("*.py")]
    said = "\n".join(text for path in modules for text in texts(path))

    pieces = [p.strip() for q in quoted for p in re.split(r"\(?\.\.\.\)?|\bN\b", q) if p.strip()]
    assert len(quoted) > 8
    assert [piece for piece in pieces if piece not in said] == []
