"""Prefixes are stored beside a cache as carefully as its tokens are."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from pipeline.cache import layout
from pipeline.cache.artefact import artefact_rows, list_artefacts
from pipeline.cache.commit import read_commits
from pipeline.carved_cache import CarvedCache, open_cache
from pipeline.cli import app
from pipeline.consumers.hf import prepare
from pipeline.consumers.kv_artefact import PrefixArtefact, open_prefixes
from pipeline.consumers.kv_prefix import make_prefix, prepare_prefixed
from pipeline.consumers.kv_writer import PrefixSummary, write_prefixes
from pipeline.errors import CacheFormatError, ConfigError, ExitCode, KeyNotFoundError
from pipeline.storage import open_store
from tests.encoders.tiny_models import TEXT, save_llava
from tests.prefix_models import (
    PROMPT,
    QUESTIONS,
    WIDTH,
    add_shard,
    build_model,
    build_tokenizer,
    claim_cache,
)

KEYS = {"a": ["a0", "a1", "a2"], "b": ["b0", "b1"]}
ALL = ["a0", "a1", "a2", "b0", "b1"]


@pytest.fixture(scope="module")
def llava() -> Any:
    return build_model()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture
def url(tmp_path: Path) -> str:
    store = open_store(str(tmp_path / "cache"))
    claim_cache(store)
    for shard_id, keys in KEYS.items():
        add_shard(store, shard_id, keys)
    return store.url


@pytest.fixture
def write(llava: Any, tokenizer: Any) -> Callable[..., PrefixSummary]:
    def call(cache: str | CarvedCache, **options: Any) -> PrefixSummary:
        opened = open_cache(cache) if isinstance(cache, str) else cache
        given = {"prompt": PROMPT, "codec": "fp32", "batch_size": 2, **options}
        return write_prefixes(opened, given.pop("model", llava), tokenizer, **given)

    return call


@pytest.fixture
def read(llava: Any, tokenizer: Any) -> Callable[..., PrefixArtefact]:
    def call(url: str, name: str = "fp32", **options: Any) -> PrefixArtefact:
        model = options.pop("model", llava)
        return open_prefixes(open_cache(url), model, tokenizer, name, **options)

    return call


def artefact(url: str, name: str = "fp32") -> Path:
    return Path(url) / "artefacts" / "kv_prefix" / name


def files(folder: Path) -> dict[str, bytes]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def new_tokens(model: Any, inputs: dict[str, Any]) -> list[list[int]]:
    ids = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


def test_what_is_read_is_what_was_made(url, write, read, llava, tokenizer) -> None:
    summary = write(url, placement="weighted")

    found = read(url)

    cache = open_cache(url)
    assert (summary.num_shards, summary.num_done_before, summary.num_images) == (2, 0, 5)
    assert list(found.keys()) == ALL
    assert (len(found), "a1" in found, "c0" in found) == (5, True, False)
    for key, prefix in zip(ALL, found.get_many(ALL), strict=True):
        made = make_prefix(llava, tokenizer, PROMPT, cache[key], placement="weighted")
        torch.testing.assert_close(prefix.states.keys, made.states.keys, rtol=0, atol=1e-5)
        torch.testing.assert_close(prefix.states.values, made.states.values, rtol=0, atol=1e-5)
        assert prefix.positions.tolist() == made.positions.tolist()
        assert prefix.sizes.tolist() == made.sizes.tolist()
        assert prefix.ranks.tolist() == made.ranks.tolist()
        assert prefix.end == made.end


def test_stored_prefixes_answer_as_stored_tokens_do(url, write, read, llava, tokenizer) -> None:
    write(url)
    cache, keys = open_cache(url), ["b1", "a0", "a2"]

    prefixes = read(url).get_many(keys)

    prompts = [PROMPT + question for question in QUESTIONS]
    from_tokens = prepare(llava, tokenizer, prompts, cache.get_many(keys))
    from_prefixes = prepare_prefixed(llava, tokenizer, prefixes, QUESTIONS)
    assert new_tokens(llava, from_prefixes) == new_tokens(llava, from_tokens)


def test_the_record_of_a_shard_says_what_was_made_of_what(url, write) -> None:
    write(url, codec="int4", codec_options={"seed": 7})

    records = list(read_commits(open_store(str(artefact(url, "int4")))))

    assert [record.shard_id for record in records] == ["a", "b"]
    assert [record.num_written for record in records] == [3, 2]
    details = records[0].details
    assert details["snapshot"] == 1
    assert details["settings"]["prompt"]["text"] == PROMPT
    assert details["settings"]["codec"] == {"name": "int4", "options": {"seed": 7}}
    assert len(details["settings"]["model"]["digest"]) == 64
    assert details["settings"]["source"] == "0" * 16


def test_sizes_are_those_of_the_rows(url, write, read) -> None:
    """5 tokens of 48 float32 in the cache; 6 of 6 matrices of 24 in an artefact, with `in`."""
    summary = write(url)

    aux = 8 + 5 * 8 + 4 + 4  # header, positions and sizes, one block, checksum
    head = 4 + 6 * 4  # its length, and of each matrix one of none
    assert summary.bytes_embeddings == 5 * (5 * 48 * 4 + aux)
    assert summary.bytes_prefixes == 5 * (6 * 6 * 24 * 4 + aux + 8 + head)
    assert read(url).row_bytes("a0") * 5 == summary.bytes_prefixes


def test_a_second_run_finds_nothing_to_do(url, write) -> None:
    write(url)
    before = files(artefact(url))

    again = write(url)

    assert (again.num_shards, again.num_done_before, again.num_images) == (2, 2, 0)
    assert files(artefact(url)) == before


def stop_at(images: int) -> Callable[[int], None]:
    done = []

    def on_progress(count: int) -> None:
        done.append(count)
        if sum(done) >= images:
            raise KeyboardInterrupt

    return on_progress


def test_a_stopped_run_is_gone_on_with(url, write, read, tmp_path) -> None:
    shutil.copytree(url, tmp_path / "undisturbed")
    write(str(tmp_path / "undisturbed"))
    with pytest.raises(KeyboardInterrupt):
        write(url, on_progress=stop_at(5))  # in the second shard

    left = files(artefact(url))
    summary = write(url)

    assert [name for name in left if name.startswith("commits/a.")]
    assert not [name for name in left if "/b" in name]
    assert (summary.num_done_before, summary.num_images) == (1, 2)
    assert {k: v for k, v in files(artefact(url)).items() if k in left} == left
    whole = read(str(tmp_path / "undisturbed")).get_many(ALL)
    for one, other in zip(read(url).get_many(ALL), whole, strict=True):
        assert torch.equal(one.states.keys, other.states.keys)
        assert torch.equal(one.states.values, other.states.values)


def test_before_its_commit_nothing_of_a_shard_is_read(url, write, read) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(url, on_progress=stop_at(5))

    assert list(read(url).keys()) == KEYS["a"]


def test_a_cache_that_grew_costs_what_is_new(url, write, read) -> None:
    write(url)
    add_shard(open_store(url), "c", ["c0"])

    summary = write(url)

    assert (summary.num_shards, summary.num_done_before, summary.num_images) == (3, 2, 1)
    assert list(read(url).keys()) == [*ALL, "c0"]


def test_a_shard_that_was_carved_again_is_made_again(url, write, read) -> None:
    write(url)
    add_shard(open_store(url), "a", ["a0", "a9"], num_tokens=3, work="e" * 16)

    summary = write(url)

    assert (summary.num_shards, summary.num_done_before, summary.num_images) == (2, 1, 2)
    assert list(read(url)) == ["a0", "a9", "b0", "b1"]
    assert len(read(url)["a0"].ranks) == 3


def test_a_row_that_another_shard_hides_has_no_prefix_of_its_own(url, write, read) -> None:
    """Shards `a` and `c` hold `a1`; the first counts, as in the cache."""
    add_shard(open_store(url), "c", ["a1", "c0"])

    summary = write(url)

    assert summary.num_images == 6
    assert list(read(url).keys()) == [*ALL, "c0"]


def test_a_budget_below_what_is_stored(url, write, read) -> None:
    write(open_cache(url, keep_tokens=2), name="two")

    with pytest.raises(ConfigError, match="keep_tokens: 2 there, None here"):
        write(url, name="two")
    assert len(read(url, "two")["a0"].ranks) == 2


def damaged(url: str, column: str) -> tuple[Path, int]:
    """Return a part of the artefact, and a place within the tokens or the aux of row a0."""
    place = artefact_rows(open_store(str(artefact(url)))).find("a0")
    return artefact(url) / place.path, getattr(place, f"{column}_offset") + 100


@pytest.mark.parametrize("column", ["tokens", "aux"])
def test_a_flipped_bit_is_found(url, write, read, column) -> None:
    write(url)
    part, place = damaged(url, column)
    content = bytearray(part.read_bytes())
    content[place] ^= 0x10
    part.write_bytes(bytes(content))

    with pytest.raises(CacheFormatError, match=r"key 'a0'.*(checksum|aux)"):
        read(url)["a0"]
    assert len(read(url)["b0"].positions) == 8
    verified = carve("verify", url)
    assert verified.exit_code == ExitCode.PARTIAL
    assert "does not match the sha256 of its commit" in verified.stderr


def test_a_damaged_identity_is_found(url, write, read) -> None:
    write(url)
    record = artefact(url) / layout.ARTEFACT_PATH
    record.write_bytes(record.read_bytes().replace(b"what is", b"what Is"))

    with pytest.raises(CacheFormatError, match="does not match its checksum"):
        read(url)


def another_model() -> Any:
    """Return the model with one weight of its last layer changed, as training would."""
    model = build_model()
    with torch.no_grad():
        model.model.language_model.layers[-1].mlp.down_proj.weight.mul_(1.001)
    return model


def test_another_model_is_refused_by_name(url, write, read) -> None:
    write(url)

    with pytest.raises(ConfigError, match=r"model\.digest: '\w{64}' there, '\w{64}' here"):
        read(url, model=another_model())
    with pytest.raises(ConfigError, match=r"model\.digest: '\w{64}' there"):
        write(url, model=another_model())


def test_another_type_of_numbers_is_taken_where_no_weight_changes(url, write, read) -> None:
    model = build_model()
    with torch.no_grad():  # weights that 16 bits hold
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    write(url, model=model)

    found = read(url, model=model.bfloat16())

    assert found["a0"].states.keys.dtype == torch.bfloat16


def test_another_prompt_is_refused_by_name(url, write, read) -> None:
    write(url)

    with pytest.raises(ConfigError, match=r"prompt\.text: 'what is <image> in' there, 'is <image>"):
        read(url, prompt="is <image>")
    with pytest.raises(ConfigError, match=r"prompt\.before: \[4, 5\] there, \[5\] here"):
        write(url, prompt="is <image>")


def test_another_codec_under_the_same_name_is_refused(url, write) -> None:
    write(url, name="mine")

    with pytest.raises(ConfigError, match=r"codec\.name: 'fp32' there, 'int8' here"):
        write(url, name="mine", codec="int8")


def test_prefixes_of_another_cache_are_refused(url, write, read, tmp_path) -> None:
    write(url)
    other = open_store(str(tmp_path / "other"))
    claim_cache(other)
    record = tmp_path / "other" / layout.IDENTITY_PATH
    record.unlink()
    other.put_once(layout.IDENTITY_PATH, _identity("1" * 16))
    add_shard(other, "a", KEYS["a"])
    shutil.copytree(Path(url) / "artefacts", tmp_path / "other" / "artefacts")

    with pytest.raises(ConfigError, match=r"source: '0{16}' there, '1{16}' here"):
        read(other.url)


def _identity(fingerprint: str) -> bytes:
    from pipeline.cache.record import dump_record

    settings = {
        "encoder": {"name": "llava", "stage": "projected"},
        "carver": {"name": "uniform_grid", "options": {}},
        "codec": {"name": "fp32", "options": {}},
        "width": WIDTH,
    }
    return dump_record({"fingerprint": fingerprint, "settings": settings, "nested": True})


def test_what_cannot_be_stored_is_rejected_and_named(url, write, read) -> None:
    """Keys beyond what 16 bits hold, in every image."""
    model = build_model()
    with torch.no_grad():
        model.model.language_model.layers[1].self_attn.k_proj.weight.mul_(1e6)

    summary = write(url, model=model, codec="fp16")

    assert (summary.num_images, summary.num_rejected, summary.bytes_prefixes) == (5, 5, 0)
    with pytest.raises(KeyNotFoundError, match="no image 'a0'"):
        read(url, "fp16", model=model)["a0"]
    (table,) = artefact(url, "fp16").glob("data/a/*/errors.parquet")
    first = pq.read_table(table).to_pylist()[0]
    assert (first["key"], first["reason"]) == ("a0", "non_finite")
    assert "too large for codec 'fp16'" in first["message"]


@pytest.mark.parametrize("name", ["../up", "", ".hidden", "a/b"])
def test_a_name_that_is_a_path_is_refused(url, write, name) -> None:
    with pytest.raises(ConfigError, match="of an artefact: use letters"):
        write(url, name=name)


def test_a_cache_of_another_width_takes_no_name(tmp_path, write) -> None:
    store = open_store(str(tmp_path / "narrow"))
    claim_cache(store, width=32)
    add_shard(store, "a", ["a0"], width=32)

    with pytest.raises(ConfigError, match="are 32 wide and the model takes 48"):
        write(store.url)
    assert list(list_artefacts(store)) == []


def test_a_cache_that_no_language_model_takes_is_refused(tmp_path, write) -> None:
    store = open_store(str(tmp_path / "vit"))
    claim_cache(store, encoder={"name": "vit"})
    add_shard(store, "a", ["a0"])

    with pytest.raises(ConfigError, match="features of encoder 'vit', which no language model"):
        write(store.url)


def test_an_artefact_is_no_cache_and_no_artefact_is_said(url, write, read) -> None:
    write(url)

    with pytest.raises(CacheFormatError, match="is not a cache"):
        open_cache(str(artefact(url)))
    with pytest.raises(CacheFormatError, match=r"is not an artefact: it has no artefact\.json"):
        read(url, "absent")


def test_prefixes_lie_in_any_store(write, read) -> None:
    store = open_store("memory://kv-prefix-test")
    claim_cache(store)
    add_shard(store, "a", KEYS["a"])

    write(store.url, codec="mixed", name="m")

    assert list(list_artefacts(store)) == [("kv_prefix", "m")]
    assert len(read(store.url, "m")["a2"].positions) == 8


def carve(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_llava(tmp_path / "model")
    words = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    words.pad_token = "<unk>"
    words.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_command_says_what_it_costs_and_then_that_nothing_is_left(tmp_path, checkpoint) -> None:
    store = open_store(str(tmp_path / "cache"))
    claim_cache(store, width=TEXT["hidden_size"])
    add_shard(store, "a", KEYS["a"], width=TEXT["hidden_size"])
    command = (
        *("kv-prefix", store.url, "--model", checkpoint, "--prompt", "USER: <image>"),
        *("--codec", "int4", "--codec-option", "seed=3", "--placement", "original"),
    )

    first, second = carve(*command), carve(*command)

    assert first.exit_code == 0, first.output
    folder = f"{store.url}/artefacts/kv_prefix/int4"
    done, cost = first.stdout.splitlines()
    assert done == f"{folder}: 1 shards committed, 0 done before, 3 images written, 0 rejected"
    # 5 tokens of 24 float32; and of 6 matrices of 12 numbers of 4 bits and a scale, with 28 bytes
    # of heads. Positions, sizes and checksums: 56 bytes of each.
    tokens, prefixes = 3 * (5 * 24 * 4 + 56), 3 * (5 * 6 * (6 + 4) + 28 + 56)
    assert cost.endswith(f"{prefixes / tokens:.1f} times as much")
    assert second.stdout == f"nothing to do: all 1 shards are in {folder}\n"


def test_the_command_refuses_in_one_line(url, checkpoint) -> None:
    result = carve("kv-prefix", url, "--model", checkpoint, "--prompt", "USER:")

    assert result.exit_code == ExitCode.CONFIG
    assert result.stderr.splitlines()[-1].startswith("error: prompt 'USER:' holds the image token")


def test_gc_finds_what_a_killed_run_left_in_an_artefact(url, write) -> None:
    write(url)
    killed = artefact(url) / "data" / "b" / "killed"
    killed.mkdir(parents=True)
    (killed / "part-00000.parquet").write_bytes(b"half")
    before = files(artefact(url))

    result = carve("gc", url, "--grace", "0")

    assert result.exit_code == 0, result.output
    assert "data/b/killed: 1 files, 4 bytes: no commit names this attempt" in result.stdout
    assert not killed.exists()
    del before["data/b/killed/part-00000.parquet"]
    assert files(artefact(url)) == before
