"""The end of a run: late shards are begun a second time, and count once."""

import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline import open_cache
from pipeline.encoders import Pixels
from pipeline.errors import ExitCode
from pipeline.ray_runner import run_job
from tests.fakes import FakeEncoder, write_corpus
from tests.ray_runner.runs import make_job, summary

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

_lock = threading.Lock()


@dataclass(kw_only=True)
class SlowElsewhere(FakeEncoder):
    """Slow in the process that loads it first, fast in any other."""

    folder: str = ""
    seconds: float = 2.0  # an image

    def load(self, **options: object) -> None:
        super().load(**options)
        self._is_slow = False
        try:
            Path(self.folder, "slow one").touch(exist_ok=False)
            self._is_slow = True
        except FileExistsError:
            return

    def preprocess(self, image: Pixels) -> Pixels:
        if self._is_slow:
            with _lock:
                time.sleep(self.seconds)
        return super().preprocess(image)


@pytest.mark.slow
def test_the_shards_of_a_slow_actor_are_done_by_an_idle_one_and_count_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_corpus(tmp_path / "in", num_shards=7, num_images=20)
    encoder = SlowElsewhere(folder=str(tmp_path))

    report = run_job(make_job(tmp_path, encoder=encoder, duplicate_tail=2.0))

    assert (report.num_committed, report.num_images, report.failed) == (7, 140, [])
    assert report.exit_code == ExitCode.OK
    assert report.num_doubled >= 1
    assert report.num_doubled_won == report.num_doubled
    assert "begun a second time" in caplog.text
    said = summary(tmp_path)
    assert said["tail_duplicates"] == {"begun": report.num_doubled, "first": report.num_doubled}
    assert said["retries_by_reason"] == {}
    assert len(open_cache(str(tmp_path / "cache"))) == 140
    # The attempts that were given up have left nothing behind.
    attempts = [len(list(folder.iterdir())) for folder in (tmp_path / "cache" / "data").iterdir()]
    assert attempts == [1] * 7
