"""An encoder is made on one machine and loaded on others: both must mean the same model."""

import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from pipeline import encoders
from pipeline.errors import ConfigError
from tests.encoders.tiny_models import save_llava

LOAD = """
import pathlib, pickle, sys
encoder = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
encoder.load()
sys.stdout.write(str(dict(encoder.describe())))
"""


def refuse_the_hub(*_, **__):
    pytest.fail("the hub is asked for what was a local directory")


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """The working directory of the driver, with a model in `demo/model`."""
    (tmp_path / "driver").mkdir()
    (tmp_path / "actor").mkdir()
    save_llava(tmp_path / "driver" / "demo" / "model")
    monkeypatch.chdir(tmp_path / "driver")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse_the_hub)
    return tmp_path / "driver"


@pytest.mark.slow
@pytest.mark.parametrize("described_first", [False, True])
def test_a_relative_model_is_loaded_in_a_process_with_another_directory(driver, described_first):
    encoder = encoders.build("llava", {"model": "demo/model"})
    expected = str(dict(encoders.build("llava", {"model": "demo/model"}).describe()))
    if described_first:
        encoder.describe()
    (driver / "encoder.pickle").write_bytes(pickle.dumps(encoder))

    result = subprocess.run(
        [sys.executable, "-c", LOAD, str(driver / "encoder.pickle")],
        capture_output=True,
        text=True,
        cwd=driver.parent / "actor",
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"},
    )

    assert result.stderr == ""
    assert result.stdout == expected
    assert str(driver) not in expected


def test_a_directory_that_another_machine_lacks_is_named_and_never_looked_for_on_the_hub(driver):
    pickled = pickle.dumps(encoders.build("llava", {"model": "demo/model"}))
    shutil.rmtree(driver / "demo")

    with pytest.raises(ConfigError) as caught:
        pickle.loads(pickled).load()

    assert str(caught.value) == (
        f"model directory {str(driver / 'demo' / 'model')!r} is not there on host "
        f"{socket.gethostname()}: use a path that every node sees"
    )


def test_a_model_directory_stays_the_one_that_was_described(driver, monkeypatch):
    encoder = encoders.build("llava", {"model": "demo/model"})
    described = encoder.describe()
    monkeypatch.chdir(driver.parent / "actor")

    encoder.load()

    assert encoder.describe() == described


def test_a_copy_of_a_copy_still_means_the_same_directory(driver, monkeypatch):
    encoder = encoders.build("llava", {"model": "demo/model"})
    once = pickle.loads(pickle.dumps(encoder))
    monkeypatch.chdir(driver.parent / "actor")

    twice = pickle.loads(pickle.dumps(once))

    assert twice == encoder
    assert twice.width == 32


def test_a_hub_model_is_not_taken_from_a_directory_that_happens_to_be_there(driver, monkeypatch):
    pickled = pickle.dumps(encoders.build("llava", {"model": "org/tiny"}))
    save_llava(driver / "org" / "tiny")
    asked = []

    def download(model, *_, **__):
        asked.append(model)
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ConfigError, match="hub cannot be reached"):
        pickle.loads(pickled).load()
    assert asked == ["org/tiny"]
