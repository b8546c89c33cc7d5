"""What is measured, on a tiny model and a corpus made in code."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from pipeline import codecs, open_cache
from pipeline.cache.commit import claim_identity
from pipeline.carve_shard import ShardCarver
from pipeline.config import parse_config
from pipeline.consumers.hf import prepare
from pipeline.decode import decode_image
from pipeline.errors import ConfigError
from pipeline.evaluation import evaluate, read_summary, read_tables, resolve_evaluation
from pipeline.evaluation.answers import load_model
from pipeline.evaluation.results import ANSWERS, IMAGES
from pipeline.job import resolve_job
from pipeline.source import expand_shards
from pipeline.storage import open_store
from tests.evaluation.corpora import QUESTIONS, TEMPLATE, config, write_images
from tests.evaluation.models import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_model(path)
    return path


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("corpus"), broken=1)


@pytest.fixture(scope="module")
def results(model: Path, shard: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("results")
    asked = config(model, shard, output, reads=["1/4"], codecs=["int8", "int4"])
    evaluate(resolve_evaluation(asked))
    return output


def rows(table: pa.Table, **values: Any) -> list[dict[str, Any]]:
    for name, value in values.items():
        table = table.filter(pc.equal(table[name], value))
    return table.to_pylist()


def column(table: pa.Table, name: str, **values: Any) -> list[Any]:
    return [row[name] for row in rows(table, **values)]


def test_there_is_one_row_for_each_image_question_and_variant(results: Path) -> None:
    answers, images = read_tables(results)

    # Reference; full tokens in 2 codecs; 5 carvers of (1/2, 1/2 read at 1/4, 1/4) in 2 codecs.
    num_variants = 1 + 2 + 5 * 3 * 2
    assert answers.schema.equals(ANSWERS) and images.schema.equals(IMAGES)
    assert len(answers) == num_variants * (1 + 2 + 3 + 1 + 2 + 3)
    assert len(images) == num_variants * 6
    first = rows(answers, key="i002", carver="tome", read=0.25, budget=0.5, codec="int4")
    assert [row["family"] for row in first] == ["count", "name", "name"]
    assert [row["prompt_index"] for row in first] == [0, 1, 2]
    assert [row["correct"] is None for row in first] == [False, False, True]


def test_full_tokens_in_float32_are_the_reference(results: Path) -> None:
    answers, images = read_tables(results)

    reference = rows(answers, carver="identity", codec="fp32")
    assert all(row["agrees"] and row["kl"] == 0 for row in reference)
    assert all(row["correct"] == row["full_correct"] for row in reference)
    assert [row["cosine"] for row in reference] == pytest.approx([1.0] * len(reference))
    assert set(column(images, "tokens", carver="identity")) == {16}
    assert column(images, "spectrum_share", carver="identity") == pytest.approx([1.0] * 18)
    full = rows(images, carver="identity", codec="fp32")
    assert all(row["effective_rank"] == row["effective_rank_full"] > 1 for row in full)


def test_carving_costs_something(results: Path) -> None:
    answers, images = read_tables(results)

    at = {"carver": "uniform_grid", "codec": "int8"}
    many, few = (column(answers, "kl", read=read, budget=read, **at) for read in (0.5, 0.25))
    assert 0 < sum(many) < sum(few)
    assert not all(column(answers, "agrees", budget=0.25, **at))
    shares = [sum(column(images, "spectrum_share", read=r, budget=r, **at)) for r in (0.5, 0.25)]
    assert 6 > shares[0] > shares[1] > 0


def test_bytes_and_tokens_are_those_of_a_cache_row(
    results: Path, model: Path, shard: Path, tmp_path: Path
) -> None:
    run = {
        "input": {"shards": str(shard)},
        "output": {"url": str(tmp_path / "cache")},
        "encoder": {"name": "llava", "options": {"model": str(model), "stage": "projected"}},
        "carver": {"name": "tome", "options": {"keep_ratio": 0.5}},
        "codec": {"name": "int4"},
    }
    job = resolve_job(parse_config(run))
    store = open_store(job.config.output.url)
    claim_identity(store, job.identity)
    carver = ShardCarver(job)
    carver.load()
    carver.carve(expand_shards(str(shard))[0])
    carver.close()
    cache = open_cache(job.config.output.url)

    _, images = read_tables(results)

    found = rows(images, carver="tome", codec="int4", budget=0.5, read=0.5)
    places = [cache.reader.find(row["key"]) for row in found]
    assert [row["bytes"] for row in found] == [p.tokens_length + p.aux_length for p in places]
    kept = [cache[row["key"]] for row in found]
    assert [row["kept_positions"] for row in found] == [k.positions.tolist() for k in kept]
    assert [row["kept_sizes"] for row in found] == [k.sizes.tolist() for k in kept]


def test_answers_divergence_and_cosine_are_those_of_the_model_on_stored_tokens(
    results: Path, model: Path, shard: Path
) -> None:
    task = resolve_evaluation(config(model, shard, results))
    task.encoder.load(signals=task.grid.needs)
    language, processor = load_model(str(model))
    asked = list(task.source.asked(task.questions, Counter()))
    (tokens,) = task.encoder.encode([decode_image(asked[2].sample.image, key="i002")])
    (cut,) = (c for c in task.grid.cuts if c.name == "divprune" and c.budget == 0.25)
    (carved,) = cut.carver.carve(tokens)
    codec = codecs.build("int4")
    stored = codec.unpack([codec.pack(carved.features)])
    text = TEMPLATE.replace("{prompt}", str(QUESTIONS[1]["prompt"]))

    outs = [
        language(**prepare(language, processor, [text], [features]), output_hidden_states=True)
        for features in (tokens.features[0], stored)
    ]

    answers, _ = read_tables(results)
    (row,) = rows(answers, key="i002", prompt_index=1, carver="divprune", codec="int4", budget=0.25)
    log_full, log_carved = (out.logits[0, -1].double().log_softmax(dim=0) for out in outs)
    kl = (log_full.exp() * (log_full - log_carved)).sum()
    hidden = [out.hidden_states[-1][0, -1] for out in outs]
    assert row["kl"] == pytest.approx(kl.item(), abs=1e-5)
    assert row["cosine"] == pytest.approx(torch.cosine_similarity(*hidden, dim=0).item(), abs=1e-5)
    said = processor.tokenizer.decode([int(log_carved.argmax())])
    assert row["answer"].startswith(said)


def test_a_prefix_of_a_nested_carver_answers_as_carving_to_fewer_does(results: Path) -> None:
    answers, images = read_tables(results)

    nested = {"carver": "divprune", "codec": "int8", "read": 0.25}
    prefix, carved = (rows(answers, budget=budget, **nested) for budget in (0.5, 0.25))
    assert [row["answer"] for row in prefix] == [row["answer"] for row in carved]
    assert [row["kl"] for row in prefix] == pytest.approx([row["kl"] for row in carved])
    merged = {"carver": "tome", "codec": "int8", "read": 0.25}
    prefix, carved = (rows(answers, budget=budget, **merged) for budget in (0.5, 0.25))
    assert [row["kl"] for row in prefix] != pytest.approx([row["kl"] for row in carved])
    assert set(column(images, "tokens", **nested)) == {4}


def test_only_the_first_images_are_disturbed(results: Path) -> None:
    _, images = read_tables(results)

    for name in ("overlap_jpeg", "overlap_shift", "overlap_noise"):
        found = column(images, name, carver="divprune", codec="int8", budget=0.25)
        assert all(0 <= value <= 1 for value in found[:2])
        assert found[2:] == [None] * 4
    same = column(images, "overlap_shift", carver="uniform_grid", codec="int8", read=0.5)
    assert same[:2] == [1, 1]


def test_the_summary_has_means_intervals_families_and_what_was_left_out(results: Path) -> None:
    summary = read_summary(results)
    answers, images = read_tables(results)

    found = {
        (row["carver"], row["budget"], row["read"], row["codec"], row["family"]): row
        for row in summary["variants"]
    }
    at = {"carver": "tome", "budget": 0.25, "read": 0.25, "codec": "int8"}
    whole = found["tome", 0.25, 0.25, "int8", "all"]
    agrees = column(answers, "agrees", **at)
    assert whole["agreement"]["mean"] == pytest.approx(sum(agrees) / len(agrees))
    assert whole["agreement"]["low"] <= whole["agreement"]["mean"] <= whole["agreement"]["high"]
    assert whole["agreement"]["images"] == 6 and whole["questions"] == len(agrees) == 12
    sizes, jpegs = column(images, "bytes", **at), column(images, "jpeg_bytes", **at)
    assert whole["bytes_per_jpeg"]["mean"] == pytest.approx(sum(sizes) / sum(jpegs))
    judged = rows(answers, family="name", **at)
    right = [r["correct"] - r["full_correct"] for r in judged if r["correct"] is not None]
    family = found["tome", 0.25, 0.25, "int8", "name"]
    assert family["accuracy_difference"]["mean"] == pytest.approx(sum(right) / len(right))
    count, name, mean = (
        found["tome", 0.25, 0.25, "int8", family]["agreement"]["mean"]
        for family in ("count", "name", "mean")
    )
    assert mean == pytest.approx((count + name) / 2)
    assert summary["rejected"] == {"corrupt_image": 1}
    assert summary["images"] == 6
    across = {(row["information"], row["loss"]): row for row in summary["information"]["across"]}
    assert across["spectrum_share", "kl"]["spearman"] < 0
    assert any(row["loss"] == "kl" for row in summary["information"]["within"])


def test_the_same_evaluation_gives_the_same_tables(
    results: Path, model: Path, shard: Path, tmp_path: Path
) -> None:
    asked = config(model, shard, tmp_path, reads=["1/4"], codecs=["int8", "int4"])

    evaluate(resolve_evaluation(asked))

    for again, before in zip(read_tables(tmp_path), read_tables(results), strict=True):
        timed = [name for name in again.column_names if name == "carve_s"]
        assert again.drop_columns(timed).equals(before.drop_columns(timed))


def test_other_batches_give_the_same_answers(
    results: Path, model: Path, shard: Path, tmp_path: Path
) -> None:
    asked = config(model, shard, tmp_path, reads=["1/4"], codecs=["int8", "int4"], batch_size=3)

    evaluate(resolve_evaluation(asked))

    again, before = (
        read_tables(folder)[0].sort_by([(name, "ascending") for name in ANSWERS.names[:9]])
        for folder in (tmp_path, results)
    )
    assert again["answer"].equals(before["answer"])
    assert again["kl"].to_pylist() == pytest.approx(before["kl"].to_pylist(), abs=1e-5)


def test_questions_of_a_file_choose_the_images(model: Path, shard: Path, tmp_path: Path) -> None:
    asked = [{"key": "i004", "prompt": "how many cats ?", "answer": "w30"}]
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(row) for row in asked))
    settings = config(
        model, shard, tmp_path / "out", column="", questions=str(tmp_path / "q.jsonl"), carvers=[]
    )

    summary = evaluate(resolve_evaluation(settings))

    answers, _ = read_tables(tmp_path / "out")
    assert set(answers["key"].to_pylist()) == {"i004"}
    assert summary["images"] == 1
    row = next(r for r in read_summary(tmp_path / "out")["variants"] if r["carver"] == "random")
    assert row["agreement"]["low"] is None  # one image tells nothing of others


def test_no_image_with_questions_is_an_error_and_leaves_no_results(
    model: Path, shard: Path, tmp_path: Path
) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"key": "other", "prompt": "what ?"}))
    settings = config(
        model, shard, tmp_path / "out", column="", questions=str(tmp_path / "q.jsonl"), carvers=[]
    )

    with pytest.raises(ConfigError, match="no image has questions"):
        evaluate(resolve_evaluation(settings))

    assert list((tmp_path / "out").iterdir()) == []
