"""Encoders that do harm, and small runs of them; for the tests of the runner."""

import json
import os
import re
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.encoders import Pixels
from pipeline.errors import ConfigError
from pipeline.job import Job, resolve_job
from pipeline.ray_runner import run_job
from pipeline.run_report import RunReport
from tests.fakes import FakeEncoder, encoded_image, fake_config, write_corpus, write_tar

MARKED_HEIGHT = 33  # of the one image that does harm, in the second shard


@dataclass(kw_only=True)
class Harmful(FakeEncoder):
    """Harms its own process when it meets the marked image: `act` is what it does, and how often.

    kill, hang, hang_hard (holding the interpreter's lock), stop (as a debugger would), raise,
    misconfigure (say that the configuration is wrong); each with `_once` or `_always`.
    `refuse_load` refuses to load, `load_for_ever` never has.
    """

    folder: str = ""
    act: str = ""

    def load(self, **options: object) -> None:
        if self.act == "refuse_load":
            raise ConfigError("no such weights")
        if self.act == "load_for_ever":
            Path(self.folder, "loading").touch()
            threading.Event().wait()
        super().load(**options)

    def preprocess(self, image: Pixels) -> Pixels:
        if image.shape[0] == MARKED_HEIGHT and self._due():
            _harm(self.act.rpartition("_")[0])
        return super().preprocess(image)

    def _due(self) -> bool:
        if self.act.endswith("_always"):
            return True
        flag = Path(self.folder, "done")
        if flag.exists():
            return False
        flag.touch()
        return True


def _harm(act: str) -> None:
    if act == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif act == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif act == "hang":
        threading.Event().wait()
    elif act == "hang_hard":
        re.match("(a+)+$", "a" * 60 + "b")  # for ages, and no other thread runs meanwhile
    elif act == "raise":
        raise RuntimeError("poison")
    elif act == "misconfigure":
        raise ConfigError("no driver on this node")


def write_marked_corpus(folder: Path, *, num_shards: int) -> Path:
    write_corpus(folder, num_shards=num_shards, num_images=4)
    marked = encoded_image(0, size=(40, MARKED_HEIGHT))
    write_tar(folder / "shard-00001.tar", [("marked.jpg", marked)])
    return folder


def make_job(
    tmp_path: Path,
    *,
    encoder: FakeEncoder | None = None,
    num_shards: int = 4,
    notify: dict[str, Any] | None = None,
    **runner: Any,
) -> Job:
    corpus = tmp_path / "in"
    if not corpus.exists():
        write_marked_corpus(corpus, num_shards=num_shards)
    settings = {"num_actors": 2, "gpus_per_actor": 0, "batch_size": 2, "progress_s": 0.5, **runner}
    config = fake_config(corpus, tmp_path / "cache", runner=settings, notify=notify or {})
    return resolve_job(config, encoder=encoder or FakeEncoder())


def run(tmp_path: Path, act: str = "", **options: Any) -> RunReport:
    encoder = Harmful(folder=str(tmp_path), act=act) if act else None
    return run_job(make_job(tmp_path, encoder=encoder, **options))


def summary(tmp_path: Path) -> dict[str, Any]:
    (path,) = (tmp_path / "cache" / "runs").glob("*/summary.json")
    return json.loads(path.read_text())
