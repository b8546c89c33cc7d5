"""Checkpoints that would run code, read other files, or claim what cannot be."""

import json
import pickle
import struct
from pathlib import Path

import pytest

from pipeline import encoders
from pipeline.encoders._safetensors import MAX_HEADER_BYTES, SafetensorsFile
from pipeline.errors import ConfigError
from tests.encoders.tiny_models import photo, save_llava


def load(model: Path) -> None:
    encoder = encoders.build("llava", {"model": str(model)})
    encoder.load()
    encoder.encode([photo()])


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (open, (str(self.path), "w"))


def test_neither_pickled_weights_nor_remote_code_are_touched(tmp_path: Path) -> None:
    proof, model = tmp_path / "proof", tmp_path / "model"
    save_llava(model)
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {name: "evil.Evil" for name in ("AutoConfig", "AutoModel")}
    config["trust_remote_code"] = True
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(f"open({str(proof)!r}, 'w')\n")
    for name in ("pytorch_model.bin", "model.pkl", "training_args.bin"):
        (model / name).write_bytes(pickle.dumps(Payload(proof)))

    load(model)  # by the safetensors file beside them

    assert not proof.exists()
    (model / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="a pickle that can run code"):
        load(model)
    assert not proof.exists()


@pytest.mark.parametrize("option", ["trust_remote_code", "auto_map"])
def test_remote_code_is_no_option(option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        encoders.build("llava", {"model": "org/tiny", option: True})


@pytest.mark.parametrize(
    "name", ["../../etc/x.safetensors", "/etc/x.safetensors", "a/b.safetensors", 7, ["x"]]
)
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, name: object) -> None:
    save_llava(tmp_path, max_shard_size="12KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    path.write_text(json.dumps(index))

    with pytest.raises(ConfigError, match="points outside"):
        load(tmp_path)


def test_an_index_cannot_name_a_pickle(tmp_path: Path) -> None:
    save_llava(tmp_path, max_shard_size="12KB")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(path.read_text().replace(".safetensors", ".bin"))

    with pytest.raises(ConfigError, match="no safetensors file"):
        load(tmp_path)


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe{}",
        json.dumps({"t": {**ENTRY, "shape": [2**62, 0], "data_offsets": [0, 0]}}).encode(),
        json.dumps({"t": {**ENTRY, "shape": [-1]}}).encode(),
        json.dumps({"t": {**ENTRY, "data_offsets": [0, 2**60]}}).encode(),
        json.dumps({"t": {**ENTRY, "data_offsets": [4, 0]}}).encode(),
        json.dumps({"t": {**ENTRY, "shape": [1 << 30]}}).encode(),
        json.dumps({"t": {**ENTRY, "shape": "x"}}).encode(),
        json.dumps({"t": 1}).encode(),
        b'{"t":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}',
    ],
)
def test_a_header_that_cannot_be_is_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))

    with pytest.raises(ConfigError, match=r"x\.safetensors"):
        dict(SafetensorsFile(path).entries)


@pytest.mark.parametrize("length", [2**63, 2**40, MAX_HEADER_BYTES + 1, 100, 1, 0])
def test_the_length_of_a_header_is_checked_before_it_is_read(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")

    with pytest.raises(ConfigError, match="not a safetensors file or is cut short"):
        dict(SafetensorsFile(path).entries)
