"""`docs/methods.md` names what there is: every plug-in, and nothing that is not one."""

import ast
import re

import pytest

from pipeline import carvers, codecs
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "methods.md").read_text()
CARVERS = carvers.names()
CODECS = codecs.names()

BUILT = {"exact", "question-free variant", "reconstruction"}
TRAINED = {"needs trained weights (loadable)", "needs trained weights (not loadable here)"}
OUTSIDE = {"does not apply"}


def tables() -> list[list[dict[str, str]]]:
    """Return the tables of the page that have a column "name here", as rows of cells by column."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        header, _, *rows = [
            [cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()
        ]
        assert {len(row) for row in rows} == {len(header)}, f"a row too long or short in {header}"
        if "name here" in header:
            found.append([dict(zip(header, row, strict=True)) for row in rows])
    return found


ROWS = [row for table in tables() for row in table]
SYSTEMS = [row for row in ROWS if "system" in row]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"the page has no section {title!r}"
    return found[1]


def test_every_plug_in_has_a_row() -> None:
    named = {name for row in ROWS for name in names(row["name here"])}

    assert sorted({*CARVERS, *CODECS} - named) == []


def test_every_name_in_a_row_is_a_plug_in() -> None:
    named = {name for row in ROWS for name in names(row["name here"])}

    assert sorted(named - {*CARVERS, *CODECS}) == []


def test_every_option_that_the_page_shows_builds() -> None:
    shown = [text for text in names(PAGE) if re.fullmatch(r"\w+\(.+\)", text)]

    assert shown
    for text in shown:
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call)
        assert isinstance(call.func, ast.Name)
        options = {option.arg: ast.literal_eval(option.value) for option in call.keywords}
        registry = carvers if call.func.id in CARVERS else codecs
        registry.build(call.func.id, options)


def test_every_system_stands_once_with_a_known_status() -> None:
    systems = [row["system"] for row in SYSTEMS]

    assert sorted({system for system in systems if systems.count(system) > 1}) == []
    assert {row["status"] for row in SYSTEMS} <= BUILT | TRAINED | OUTSIDE


@pytest.mark.parametrize("row", SYSTEMS, ids=lambda row: row["system"])
def test_what_is_built_has_a_name_and_what_does_not_apply_has_none(row: dict[str, str]) -> None:
    if row["status"] in BUILT:
        assert names(row["name here"])
    if row["status"] in OUTSIDE:
        assert row["name here"] == "-"


def test_the_nested_carvers_are_those_that_say_so() -> None:
    nested = [name for name in CARVERS if carvers.build(name).nested]
    said = section("Which are nested, and why")

    listed = re.search(r"^Nested: (.*?)\n\n", said, re.MULTILINE | re.DOTALL)
    assert listed
    assert sorted(names(listed[1])) == nested


def test_every_file_that_the_page_links_to_is_there() -> None:
    links = re.findall(r"\]\(((?!https?:)[^)#]+)", PAGE)

    assert links
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
