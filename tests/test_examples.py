"""The examples, run as a user runs them, on the demo's model and caches that the real code made."""

import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import ask_a_corpus
import finetune_from_cache
import generate_from_cache
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cached_model import CachedModel, batched, load_cached_model, run
from finetune_from_cache import Plan, Sequences
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline import open_cache
from pipeline.cache.commit import claim_identity
from pipeline.carve_shard import ShardCarver
from pipeline.carved_cache import CachedImage
from pipeline.config import parse_config
from pipeline.consumers.hf import weighted_generate
from pipeline.demo.model import TEMPLATE, answer_both_ways, copy_model
from pipeline.demo.quiz import draw_quiz
from pipeline.errors import ConfigError
from pipeline.evaluation.answers import load_model
from pipeline.evaluation.questions import read_questions
from pipeline.job import resolve_job
from pipeline.plan import make_plan
from pipeline.storage import open_store
from tests.conftest import ROOT
from tests.fakes import write_tar

NUM_IMAGES = 10
QUESTION = "what color is the star"
STEPS, BATCH = 6, 3
CACHES: Mapping[str, dict] = {
    "projected": {"stage": "projected", "carver": {"name": "identity"}, "codec": "fp32"},
    "pre_projector": {"stage": "pre_projector", "carver": {"name": "identity"}, "codec": "fp32"},
    "carved": {
        "stage": "projected",
        "carver": {"name": "prumerge_plus"},  # images decide how many tokens they keep
        "codec": "int8",
    },
}


@dataclass(frozen=True)
class Place:
    """Where the model, the caches by name, the questions and the pictures are."""

    folder: Path
    pictures: Mapping[str, Image.Image]

    @property
    def model(self) -> str:
        return str(self.folder / "model")

    def cache(self, name: str) -> str:
        return str(self.folder / name)

    def arguments(self, name: str, *more: object, model: str = "") -> list[str]:
        fixed = ["--cache", self.cache(name), "--model", model or self.model]
        return [*fixed, "--template", TEMPLATE, "--device", "cpu", *map(str, more)]

    def training(self, name: str, output: Path, *more: object, model: str = "") -> list[str]:
        asked = ("--questions", self.folder / "questions.jsonl", "--output", output)
        size = ("--steps", STEPS, "--batch-size", BATCH, "--learning-rate", 3e-3)
        return self.arguments(name, *asked, *size, *more, model=model)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("examples")
    copy_model(folder / "model")
    members, pictures, lines = [], {}, []
    for number in range(NUM_IMAGES):
        key = f"q{number:03d}"
        quiz = draw_quiz(random.Random(f"examples/{number}"))
        sink = io.BytesIO()
        quiz.image.save(sink, "JPEG", quality=90)
        with Image.open(sink) as image:
            pictures[key] = image.convert("RGB")
        about = {"questions": [asdict(question) for question in quiz.questions]}
        members += [(f"{key}.jpg", sink.getvalue()), (f"{key}.json", json.dumps(about).encode())]
        # Answers that the model would not give, of several lengths, so that there is to learn.
        lines += [
            {"key": key, "prompt": QUESTION, "answer": "ring"},
            {"key": key, "prompt": "read the plate that is red", "answer": "left above right"},
        ]
    write_tar(folder / "in" / "shard.tar", members)
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, plugins in CACHES.items():
        carve(folder, name, **plugins)
    return Place(folder, pictures)


def carve(folder: Path, name: str, *, stage: str, carver: dict, codec: str) -> None:
    options = {"model": str(folder / "model"), "stage": stage, "resize": "pillow"}
    config = parse_config(
        {
            "input": {"shards": str(folder / "in"), "columns": ["json"]},
            "output": {"url": str(folder / name)},
            "encoder": {"name": "llava", "options": options},
            "carver": carver,
            "codec": {"name": codec},
            "runner": {"batch_size": 4, "num_actors": 1, "gpus_per_actor": 0},
        }
    )
    job = resolve_job(config)
    store = open_store(job.config.output.url)
    claim_identity(store, job.identity)
    carver_process = ShardCarver(job)
    carver_process.load()
    for shard in make_plan(job, store).todo:
        carver_process.carve(shard)
    carver_process.close()


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "loss.jsonl").read_text().splitlines()]


def pixel_batches(place: Place, language: CachedModel, options: Namespace) -> Iterator[Sequences]:
    """Yield the batches of the same training from pixels, by the model's own processor."""
    _, processor = load_model(place.model)
    cache = open_cache(options.cache)
    questions = read_questions(options.questions)
    lessons = finetune_from_cache.read_lessons(cache, questions, options)
    for batch in batched(lessons, options.batch_size):
        prompts = language.texts([lesson.prompt for lesson in batch])
        answers = [lesson.answer for lesson in batch]
        texts = finetune_from_cache.write_sequences(prompts, answers, language.tokenizer)
        images = [place.pictures[lesson.row.key] for lesson in batch]
        inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
        labels = finetune_from_cache.label_answers(
            inputs["input_ids"], prompts, texts, language.tokenizer
        )
        yield Sequences(dict(inputs), labels)


@pytest.mark.parametrize(
    ("stage", "placement"),
    [
        ("projected", "weighted"),
        ("pre_projector", "packed"),
        pytest.param("projected", "packed", marks=pytest.mark.slow),
        pytest.param("pre_projector", "weighted", marks=pytest.mark.slow),
    ],
)
def test_training_from_a_cache_has_the_losses_of_training_from_pixels(
    stage: str, placement: str, place: Place, tmp_path: Path
) -> None:
    arguments = place.training(stage, tmp_path, "--placement", placement)
    options = finetune_from_cache.parse_options(arguments)
    language = load_cached_model(open_cache(place.cache(stage)), options)
    model, _ = load_model(place.model)
    trained = finetune_from_cache.make_trainable(model, stage=stage, options=options)
    plan = Plan(steps=STEPS, learning_rate=3e-3, warm_up=0)
    steps = finetune_from_cache.train(trained, pixel_batches(place, language, options), plan)
    from_pixels = [loss for loss, _ in steps]

    finetune_from_cache.main(arguments)

    assert len(from_pixels) == STEPS and from_pixels[-1] < 0.7 * from_pixels[0]
    torch.testing.assert_close(losses(tmp_path), from_pixels, rtol=0, atol=1e-4)
    assert (tmp_path / "projector.safetensors").exists() is (stage == "pre_projector")


@pytest.mark.slow
def test_what_was_trained_is_saved_and_answers_otherwise(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tuned"
    finetune_from_cache.main(place.training("pre_projector", output, "--steps", 40))
    asked = place.arguments("pre_projector", "--prompt", QUESTION, "--max-new-tokens", 4)
    capsys.readouterr()

    generate_from_cache.main(asked)
    before = answers_of(capsys.readouterr().out)
    generate_from_cache.main([*asked, "--trained", str(output)])
    after = answers_of(capsys.readouterr().out)

    assert len(before) == len(after) == NUM_IMAGES
    assert list(after.values()).count("ring") >= 5 and "ring" not in before.values()
    projector = load_file(output / "projector.safetensors")
    original = load_file(Path(place.model) / "model.safetensors")
    moved = [
        (weight - original[f"multi_modal_projector.{name}"].float()).abs().max().item()
        for name, weight in projector.items()
    ]
    assert len(moved) == 4 and min(moved) > 1e-3
    adapter = load_file(output / "adapter" / "adapter_model.safetensors")
    assert adapter and all("language_model" in name and "lora" in name for name in adapter)


def answers_of(printed: str) -> dict[str, str]:
    return dict(line.split("\t") for line in printed.splitlines())


def without_tower_file(place: Place, folder: Path) -> str:
    """Copy the model with the file of its tower missing and a tower of 10 GB in its config."""
    copy_model(folder)
    weights = load_file(folder / "model.safetensors")
    tower = {name for name in weights if name.startswith("vision_tower.")}
    rest = {name: weight for name, weight in weights.items() if name not in tower}
    save_file(rest, folder / "rest.safetensors")
    places = {
        name: "tower.safetensors" if name in tower else "rest.safetensors" for name in weights
    }
    (folder / "model.safetensors").unlink()
    index = json.dumps({"weight_map": places})
    (folder / "model.safetensors.index.json").write_text(index)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["intermediate_size"] = 1_000_000  # 6 layers of 2 * 192 times that
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def run_script(name: str, arguments: Sequence[str]) -> tuple[subprocess.CompletedProcess[str], int]:
    """Run an example in its own process; return what came of it and its peak memory in bytes."""
    wrapped = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "from tests.process_memory import memory_bytes\n"
        "sys.path.insert(0, 'examples')\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('peak', memory_bytes('VmHWM'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", wrapped, f"examples/{name}.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    return done, int(done.stdout.rsplit("peak", 1)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
@pytest.mark.slow
def test_training_neither_reads_nor_allocates_the_tower(place: Place, tmp_path: Path) -> None:
    model = without_tower_file(place, tmp_path / "model")
    arguments = place.training("pre_projector", tmp_path / "out", model=model)

    done, peak_bytes = run_script("finetune_from_cache", arguments)

    assert done.returncode == 0, done.stderr
    assert peak_bytes < 1.5e9  # the tower alone would be 9 GB
    finetune_from_cache.main(place.training("pre_projector", tmp_path / "whole"))
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    assert not (Path(model) / "tower.safetensors").exists()


@pytest.mark.slow
def test_training_again_with_the_same_seed_gives_the_same_and_another_does_not(
    place: Place, tmp_path: Path
) -> None:
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        finetune_from_cache.main(place.training("carved", tmp_path / name, "--seed", seed))

    one, again, other = (losses(tmp_path / name) for name in ("one", "again", "other"))
    assert one == again != other


@pytest.mark.slow
def test_a_training_from_the_caches_own_questions_learns_in_bfloat16(
    place: Place, tmp_path: Path
) -> None:
    size = ("--steps", 3, "--batch-size", 4, "--workers", 1)
    arguments = place.arguments(
        "pre_projector", "--column", "json", "--output", tmp_path, "--dtype", "bfloat16", *size
    )

    finetune_from_cache.main(arguments)

    assert max(losses(tmp_path)) < 1.0  # it was trained on these kinds of questions
    saved = load_file(tmp_path / "projector.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    about = json.loads((tmp_path / "training.json").read_text())
    assert about["stage"] == "pre_projector" and about["versions"]["torch"] == torch.__version__


def test_a_projector_in_float32_leaves_the_rest_in_half_precision(place: Place) -> None:
    arguments = place.training("pre_projector", Path("unused"), "--dtype", "bfloat16")
    options = finetune_from_cache.parse_options(arguments)
    cache = open_cache(options.cache)
    language = load_cached_model(cache, options)
    model = finetune_from_cache.make_trainable(
        language.model, stage="pre_projector", options=options
    )
    questions = read_questions(options.questions)
    lessons = finetune_from_cache.read_lessons(cache, questions, options)
    batches = finetune_from_cache.cached_batches(language, cache, lessons, options)
    seen = []

    def watched() -> Iterator[finetune_from_cache.Sequences]:
        for batch in batches:
            seen.append((torch.is_autocast_enabled("cpu"), batch.inputs["position_bias"].dtype))
            yield batch

    plan = finetune_from_cache.Plan(steps=1, warm_up=0, learning_rate=1e-3, gradient_norm=1.0)
    list(finetune_from_cache.train(model, watched(), plan))

    assert language.model.model.multi_modal_projector.linear_1.weight.dtype == torch.float32
    assert seen == [(True, torch.bfloat16)]


def test_labels_are_the_answers_and_nothing_else(place: Place) -> None:
    _, processor = load_model(place.model)
    tokenizer = processor.tokenizer
    prompts = ["<image> count every star", "<image> read the plate that is red"]
    texts = finetune_from_cache.write_sequences(prompts, ["2", "A B C"], tokenizer)
    ids = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]

    labels = finetune_from_cache.label_answers(ids, prompts, texts, tokenizer)

    words = [tokenizer.convert_ids_to_tokens([i for i in row if i >= 0]) for row in labels.tolist()]
    assert words == [["2", "</s>"], ["A", "B", "C", "</s>"]]
    assert (labels[0, :-2] == -100).all() and (labels[1, :-4] == -100).all()


def test_a_ragged_batch_has_the_mean_loss_of_its_parts(place: Place) -> None:
    cache = open_cache(place.cache("carved"))
    arguments = place.training("carved", Path("unused"))
    options = finetune_from_cache.parse_options(arguments)
    language = load_cached_model(cache, options)
    questions = read_questions(options.questions)
    lessons = list(itertools.islice(finetune_from_cache.read_lessons(cache, questions, options), 5))
    assert len({lesson.row.num_tokens for lesson in lessons}) > 1
    assert len({lesson.answer for lesson in lessons}) > 1

    def loss_and_count(part: Sequence) -> tuple[float, int]:
        together = Namespace(**{**vars(options), "batch_size": len(part)})
        (batch,) = finetune_from_cache.cached_batches(language, cache, part, together)
        loss = finetune_from_cache.answer_loss(language.model, batch)
        return loss.item(), int((batch.labels != -100).sum())

    whole, total = loss_and_count(lessons)
    alone = [loss_and_count([lesson]) for lesson in lessons]

    assert total == sum(count for _, count in alone)
    mean = sum(loss * count for loss, count in alone) / total
    assert whole == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--lora-rank", 0), "nothing to train: the cache's stage is 'projected'"),
        (("--lora-layers", "nope"), "--lora-layers 'nope'"),
        (("--template", "{prompt}"), "must hold <image> once"),
    ],
)
def test_a_training_that_cannot_be_is_refused(
    more: tuple, message: str, place: Place, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        finetune_from_cache.main(place.training("projected", tmp_path, *more))


def test_questions_for_no_image_and_a_folder_in_use_are_refused(
    place: Place, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"key": "elsewhere", "prompt": QUESTION, "answer": "ring"}))
    arguments = place.training("projected", tmp_path / "out", "--questions", other)

    with pytest.raises(ConfigError, match="no question with an answer for any of the 10 images"):
        finetune_from_cache.main(arguments)
    with pytest.raises(ConfigError, match="is not empty; choose a new --output"):
        finetune_from_cache.main(place.training("projected", tmp_path))


def test_answers_from_a_cache_of_all_tokens_are_those_from_pixels(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = open_cache(place.cache("projected"))
    keys = sorted(place.pictures)
    expected = answer_both_ways(
        Path(place.model),
        [QUESTION] * len(keys),
        [place.pictures[key] for key in keys],
        cache.get_many(keys),
    )

    generate_from_cache.main(
        place.arguments("projected", "--prompt", QUESTION, "--batch-size", 4, "--first", 99)
    )

    found = answers_of(capsys.readouterr().out)
    assert found == {key: full for key, (full, _) in zip(keys, expected, strict=True)}
    assert len(set(found.values())) > 1


def test_the_generating_script_answers_the_keys_given_in_their_order(place: Place) -> None:
    arguments = place.arguments("carved", "--prompt", QUESTION, "--keys", "q007", "q002")

    done, _ = run_script("generate_from_cache", arguments)

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[:2]
    assert [line.split("\t")[0] for line in lines] == ["q007", "q002"]
    assert all(line.split("\t")[1] for line in lines)
    assert "answering" in done.stderr


def test_a_temperature_draws_words_by_the_seed(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(seed: int) -> str:
        hot = ("--prompt", QUESTION, "--temperature", 20, "--seed", seed, "--max-new-tokens", 4)
        generate_from_cache.main(place.arguments("carved", *hot))
        return capsys.readouterr().out

    assert said(1) == said(1) != said(2)


def asking(place: Place, output: object, *more: object) -> list[str]:
    asked = ("--question", QUESTION, "--output", output, "--max-new-tokens", 4)
    return place.arguments("carved", *asked, "--batch-size", 2, "--rows-per-part", 3, *more)


@pytest.mark.slow
def test_every_image_of_a_corpus_has_one_answer_as_parquet(place: Place, tmp_path: Path) -> None:
    done, _ = run_script("ask_a_corpus", asking(place, tmp_path / "answers"))

    assert done.returncode == 0, done.stderr
    assert "10 of 10 images answered" in done.stderr
    table = pq.read_table(tmp_path / "answers")  # passes over _question.json
    assert table.schema.remove_metadata() == ask_a_corpus.SCHEMA
    assert sorted(table["key"].to_pylist()) == sorted(place.pictures)
    cache = open_cache(place.cache("carved"))
    kept = {key: len(cache[key].positions) for key in cache}
    rows = table.to_pylist()
    assert {row["key"]: row["num_visual_tokens"] for row in rows} == kept
    counts = {row["key"]: row["num_tokens"] for row in rows}
    assert set(counts.values()) == {2, 4}  # a colour and the end, or cut off
    of_each = {counts[key]: key for key in counts}
    assert all(num_alone(place, cache[key]) == count for count, key in of_each.items())


def num_alone(place: Place, image: CachedImage) -> int:
    """Return how many tokens `generate` gives for one image alone, so without any padding."""
    options = ask_a_corpus.parse_options(asking(place, "unused"))
    language = load_cached_model(open_cache(options.cache), options)
    inputs = language.inputs([image], language.texts([QUESTION]))
    output = weighted_generate(language.model, inputs, max_new_tokens=options.max_new_tokens)
    return output.shape[1] - inputs["input_ids"].shape[1]


def test_a_stopped_corpus_goes_on_where_it_was(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = "memory://examples-answers"
    ask, asked = ask_a_corpus.ask, []

    def ask_and_stop(language, images, options):
        asked.extend(image.key for image in images)
        if len(asked) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return ask(language, images, options)

    monkeypatch.setattr(ask_a_corpus, "ask", ask_and_stop)
    with pytest.raises(SystemExit) as stopped:
        ask_a_corpus.main(asking(place, output))
    first = list(asked)
    ask_a_corpus.main(asking(place, output))
    ask_a_corpus.main(asking(place, output))

    assert stopped.value.code == 75
    assert first == sorted(place.pictures)[:4] and asked == sorted(place.pictures)
    tables = stored_answers(output)
    assert sorted(pa.concat_tables(tables)["key"].to_pylist()) == sorted(place.pictures)
    said = capsys.readouterr().err
    assert "4 of 10 images answered" in said and "nothing to do: all 10 images" in said


def test_answers_of_images_that_are_gone_do_not_stand_for_others(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = "memory://examples-answers-of-gone-images"
    parts = ask_a_corpus.AnswerParts(store=open_store(output), rows_per_part=3)
    gone = {"answer": "ring", "num_visual_tokens": 1, "num_tokens": 1}
    parts.add([{"key": f"gone{number}", **gone} for number in range(6)])
    parts.write()
    ask = ask_a_corpus.ask

    def ask_and_stop(language, images, options):
        os.kill(os.getpid(), signal.SIGTERM)
        return ask(language, images, options)

    monkeypatch.setattr(ask_a_corpus, "ask", ask_and_stop)
    with pytest.raises(SystemExit) as stopped:
        ask_a_corpus.main(asking(place, output))

    assert stopped.value.code == 75
    assert "2 of 10 images answered" in capsys.readouterr().err


def stored_answers(url: str) -> list[pa.Table]:
    store = open_store(url)
    paths = [entry.path for entry in store.list() if entry.path.endswith(".parquet")]
    return [pq.read_table(io.BytesIO(store.read(path))) for path in paths]


def test_a_failure_costs_no_answer_before_it(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ask = ask_a_corpus.ask

    def ask_or_fail(language, images, options):
        if images[0].key == "q002":
            raise ConfigError("a damaged row")
        return ask(language, images, options)

    monkeypatch.setattr(ask_a_corpus, "ask", ask_or_fail)

    with pytest.raises(ConfigError, match="a damaged row"):
        ask_a_corpus.main(asking(place, tmp_path))

    assert pq.read_table(tmp_path)["key"].to_pylist() == ["q000", "q001"]


def test_answers_to_another_question_are_not_mixed_in(place: Place, tmp_path: Path) -> None:
    ask_a_corpus.main(asking(place, tmp_path))

    with pytest.raises(ConfigError, match="holds answers with keep_tokens None, not 8; choose"):
        ask_a_corpus.main(asking(place, tmp_path, "--keep-tokens", 8))


def test_an_error_is_one_line_and_exit_code_2(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = place.arguments("carved", "--prompt", QUESTION, "--keys", "nobody")

    with pytest.raises(SystemExit) as ended:
        run(lambda: generate_from_cache.main(arguments))

    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: no image 'nobody' in ")
