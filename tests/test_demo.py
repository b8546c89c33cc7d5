"""The demo: its corpus, its model, its report, and the command from end to end."""

import json
import os
import random
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from pipeline.carved_cache import CachedImage
from pipeline.config import load_config
from pipeline.decode import decode_image
from pipeline.demo import demo_config, run_demo
from pipeline.demo.corpus import DAMAGES, PHOTOS, Corpus, write_corpus
from pipeline.demo.model import answer_both_ways, copy_model
from pipeline.demo.quiz import FAMILIES, draw_quiz
from pipeline.demo.report import Answer, CarvedPicture, DemoReport, render
from pipeline.encoders import build
from pipeline.errors import ConfigError, DecodeError
from pipeline.evaluation.drawing import SeenImage
from pipeline.types import RejectedSample

ROOT = Path(__file__).parents[1]
IMAGES = ("jpg", "png", "webp")
VOID = {"meta", "img", "br"}  # elements that have no end


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    copy_model(folder)
    return folder


def members(corpus: Corpus) -> Iterator[tuple[str, str, bytes]]:
    """Yield key, suffix and content of every member."""
    for shard in corpus.shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                key, suffix = member.name.split(".")
                file = tar.extractfile(member)
                assert file is not None
                yield key, suffix, file.read()


def rejection(key: str, content: bytes) -> str | None:
    try:
        decode_image(content, key=key)
    except DecodeError as err:
        return err.reason
    return None


def test_the_corpus_is_the_same_every_time_and_untouched_when_made_again(
    tmp_path: Path,
) -> None:
    first = write_corpus(tmp_path / "a", num_shards=1)
    again = write_corpus(tmp_path / "b", num_shards=1)
    written_at = first.shards[0].stat().st_mtime_ns
    write_corpus(tmp_path / "a", num_shards=1)

    assert first.shards[0].read_bytes() == again.shards[0].read_bytes()
    assert first.shards[0].stat().st_mtime_ns == written_at


def test_another_seed_gives_another_corpus(tmp_path: Path) -> None:
    one, two = (
        write_corpus(tmp_path / str(seed), num_shards=1, images_per_shard=4, seed=seed)
        for seed in (1, 2)
    )

    assert one.shards[0].read_bytes() != two.shards[0].read_bytes()


def test_the_corpus_is_in_every_format_and_says_what_is_in_it(corpus: Corpus) -> None:
    found = list(members(corpus))
    sizes = [
        decode_image(content, key=key).shape
        for key, suffix, content in found
        if suffix in IMAGES and not key.startswith("broken")
    ]
    described = [json.loads(content) for _, suffix, content in found if suffix == "json"]
    captions = [content.decode() for _, suffix, content in found if suffix == "txt"]

    assert corpus.num_images == 240 == len(described) == len({key for key, _, _ in found})
    assert sum(corpus.formats.values()) == len(sizes) == 234
    assert min(corpus.formats[name] for name in ("jpeg", "png", "webp")) >= 20
    assert min(side for shape in sizes for side in shape[:2]) == 168
    assert max(side for shape in sizes for side in shape[:2]) <= 900
    assert {about["source"] for about in described} == {"drawn", *(f"{p}.jpg" for p in PHOTOS)}
    assert captions == list(corpus.captions)
    assert sum("questions" in about for about in described) == 54


def test_exactly_the_planted_samples_cannot_be_decoded(corpus: Corpus) -> None:
    reasons = Counter(
        rejection(key, content) for key, suffix, content in members(corpus) if suffix in IMAGES
    )
    whole = reasons.pop(None)

    assert whole == 234
    assert reasons == corpus.broken == Counter(damage.reason for damage in DAMAGES)


def test_every_photograph_has_its_credit() -> None:
    folder = ROOT / "pipeline" / "demo" / "photos"

    files = sorted(path.name for path in folder.glob("*.jpg"))

    assert files == sorted(f"{name}.jpg" for name in PHOTOS)
    assert all(f"`{name}`" in (folder / "README.md").read_text() for name in files)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 600_000


def test_the_model_comes_with_the_package_whole_and_small(model: Path) -> None:
    report = json.loads((model / "training.json").read_text())
    weights = load_file(model / "model.safetensors")

    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert 5e6 < sum(weight.numel() for weight in weights.values()) < 20e6
    assert set(report["heldout_accuracy"]) == set(FAMILIES)
    assert (model / "model.safetensors").stat().st_size < 24_000_000


def test_a_copied_model_is_left_alone_when_copied_again(model: Path) -> None:
    written_at = {path.name: path.stat().st_mtime_ns for path in model.iterdir()}
    copy_model(model)

    assert {path.name: path.stat().st_mtime_ns for path in model.iterdir()} == written_at


@pytest.mark.slow
def test_uncarved_tokens_of_the_encoder_give_the_answers_that_pixels_give(model: Path) -> None:
    quizzes = [draw_quiz(random.Random(f"demo test {number}")) for number in range(12)]
    pixels = [np.asarray(quiz.image) for quiz in quizzes]
    encoder = build("llava", {"model": str(model), "stage": "projected"})
    encoder.load()
    (tokens,) = encoder.encode(pixels)
    images = [
        CachedImage(
            key="",
            features=features_ND,
            positions=torch.arange(144),
            sizes=torch.ones(144),
            ranks=torch.arange(144),
            grid=(1, *tokens.grid),
            width=168,
            height=168,
        )
        for features_ND in tokens.features
    ]
    asked = [(n, question) for n, quiz in enumerate(quizzes) for question in quiz.questions]

    answers = answer_both_ways(
        model,
        [question.prompt for _, question in asked],
        [quizzes[number].image for number, _ in asked],
        [images[number] for number, _ in asked],
    )

    assert tokens.grid == (12, 12)
    assert [full for full, _ in answers] == [carved for _, carved in answers]
    right = [
        full == question.answer for (full, _), (_, question) in zip(answers, asked, strict=True)
    ]
    assert np.mean(right) > 0.9  # it is trained: held out it answers more than that


def test_the_report_is_one_valid_page_with_the_numbers(page: str) -> None:
    checker = Checker()
    checker.feed(page)
    checker.close()

    assert checker.open == []
    assert checker.sources and all(s.startswith("data:image/jpeg;base64,") for s in checker.sources)
    assert "url(" not in page
    for words in (
        "2.00 MB",
        "25.60 MB",
        "1.50 MB",
        "40.0 images a second",
        "0 of 1",
        "; 1 from all",
    ):
        assert words in page
    assert "corrupt_image 1" in page
    assert "&lt;b&gt; is no image" in page
    assert "49 kept in 7.4 kB" in page
    assert "what is &lt;b&gt;?" in page
    assert "red \N{CHECK MARK}" in page
    assert 'title="right: red">a &lt;blue&gt; \N{BALLOT X}' in page


@pytest.fixture
def page() -> str:
    answer = Answer(prompt="what is <b>", wanted="red", full="red", carved="a <blue>")
    picture = CarvedPicture(
        key="photo-0001",
        caption='a "cat" & a <dog>',
        image=SeenImage(views=[Image.new("RGB", (224, 224))], grid=(14, 14)),
        positions=range(49),
        sizes=[1.0] * 49,
        bytes_in=30_000,
        bytes_stored=7_400,
        answers=[answer],
    )
    rejected = RejectedSample(
        key="broken-0001", stage="decode", reason="corrupt_image", message="<b> is no image"
    )
    return render(
        DemoReport(
            plugins={"carver": 'tokencarve {"keep_ratio": 0.25}'},
            versions={"torch": "2.13"},
            num_actors=2,
            num_shards=6,
            num_images=200,
            bytes_in=2_000_000,
            tokens_full=100_000,
            tokens_kept=25_000,
            width=128,
            bytes_tokens=1_500_000,
            bytes_files=1_600_000,
            seconds=5.0,
            stage_seconds={"encode": 4.0, "read": 0.5},
            rejected=[rejected],
            answers=[answer],
            pictures=[picture],
        )
    )


class Checker(HTMLParser):
    """Follows which elements are open, and what is loaded from where."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_committed_config_is_the_run_of_the_command_with_nothing_left_out() -> None:
    path = ROOT / "configs" / "demo.yaml"
    config = demo_config(Path("demo"))

    assert load_config(path) == config
    assert yaml.safe_load(path.read_text()) == config.model_dump(mode="json")


def test_a_folder_that_holds_something_else_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")

    with pytest.raises(ConfigError, match=r"holds other files: choose another --output"):
        next(run_demo(tmp_path))

    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def run_cli(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline", "demo", "--output", "demo"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.ray
@pytest.mark.slow
def test_the_demo_runs_from_end_to_end_and_has_nothing_to_do_the_second_time(
    tmp_path: Path,
) -> None:
    first = run_cli(tmp_path)
    second = run_cli(tmp_path)
    summaries = [json.loads(p.read_text()) for p in tmp_path.glob("demo/cache/runs/*/summary.json")]

    assert first.returncode == 0, first.stderr
    assert "carved: 6 shards, 234 images" in first.stdout
    assert (
        "rejected: 6 samples, as planted: corrupt_image 3, empty_image 1, not_an_image 2"
        in first.stdout
    )
    assert "all 33,696 tokens in 16 bits" in first.stdout
    assert "the 7,488 carved tokens as stored" in first.stdout
    right = re.search(
        r"answers: (\d+) of (\d+) questions right from the carved tokens, (\d+) ", first.stdout
    )
    assert right is not None, first.stdout
    carved, asked, full = map(int, right.groups())
    assert asked > 100
    assert full >= 0.85 * asked
    assert carved >= full - 0.05 * asked  # the default carver
    assert second.returncode == 0, second.stderr
    assert f"nothing to do: all 6 shards are in {tmp_path / 'demo' / 'cache'}" in second.stdout
    assert len(summaries) == 1 and summaries[0]["images"] == 234
    assert (tmp_path / "demo" / "report.html").stat().st_size > 100_000
