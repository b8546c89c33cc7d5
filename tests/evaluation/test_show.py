"""`carve show`: images encoded anew, rows of a cache, pages and pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from pipeline import carvers, encoders
from pipeline.cache.commit import claim_identity
from pipeline.carve_shard import ShardCarver
from pipeline.cli import app
from pipeline.config import JobConfig, load_config
from pipeline.decode import decode_image
from pipeline.encoders import Pixels
from pipeline.errors import ConfigError, ExitCode, KeyNotFoundError, MissingSignalError
from pipeline.evaluation.drawing import draw_tokens, seen_image
from pipeline.evaluation.show import show_images, show_row
from pipeline.evaluation.shown import Carving, ShownImage, render_shown, write_shown
from pipeline.job import Job, resolve_job
from pipeline.source import expand_shards
from pipeline.storage import open_store
from pipeline.types import TileLayout, VisualTokens
from tests.encoders.tiny_models import save_vit
from tests.evaluation.html_checker import check_page
from tests.fakes import FakeEncoder, encoded_image, write_corpus

SIDE = 4  # patches along each edge of the tiny model
KEY = "s0-i001"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a corpus of one shard, its images as files, and a filled cache."""
    place = tmp_path_factory.mktemp("show")
    save_vit(place / "model", "clip")
    write_corpus(place / "corpus", num_shards=1, num_images=3)
    for index in range(3):
        (place / f"{index}.jpg").write_bytes(encoded_image(index))
    values: dict[str, Any] = {
        "encoder": {"name": "vit", "options": {"model": str(place / "model")}},
        "carver": {"name": "tokencarve", "options": {"keep_tokens": 4, "attention_weight": 0.5}},
        "runner": {"batch_size": 2},
    }
    (place / "run.yaml").write_text(yaml.safe_dump(values))
    fill_cache(resolve_job(run_config(place)))
    return place


def fill_cache(job: Job) -> None:
    claim_identity(open_store(job.config.output.url), job.identity)
    carver = ShardCarver(job)
    carver.load()
    (shard,) = expand_shards(job.config.input.shards)
    carver.carve(shard)
    carver.close()


def run_config(place: Path) -> JobConfig:
    return load_config(
        place / "run.yaml",
        input_shards=str(place / "corpus"),
        output_url=str(place / "cache"),
    )


def carve_show(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["show", *(str(a) for a in arguments)])


def files(place: Path, *indices: int) -> list[str]:
    return [str(place / f"{index}.jpg") for index in indices]


def prepared(place: Path, index: int) -> Pixels:
    encoder = encoders.build("vit", {"model": str(place / "model")})
    return encoder.preprocess(decode_image((place / f"{index}.jpg").read_bytes(), key="k"))


def test_images_are_carved_as_a_run_would_carve_them_and_keep_their_order(place: Path) -> None:
    encoder = encoders.build("vit", {"model": str(place / "model")})
    carver = carvers.build("tokencarve", {"keep_tokens": 4, "attention_weight": 0.5})
    encoder.load(signals=carver.needs)

    shown = show_images(run_config(place), files(place, 2, 0, 1))

    assert [Path(image.name).name for image in shown] == ["2.jpg", "0.jpg", "1.jpg"]
    for image, index in zip(shown, (2, 0, 1), strict=True):
        (tokens,) = encoder.encode_pixels([prepared(place, index)])
        (expected,) = carver.carve(tokens)
        (carving,) = image.carvings
        assert carving.positions == expected.positions.tolist()
        assert carving.sizes == pytest.approx(expected.sizes.tolist())
        assert np.array_equal(np.asarray(image.seen.views[0]), prepared(place, index))


def test_several_carvers_take_the_budget_of_the_config_or_the_one_asked_for(place: Path) -> None:
    names = ["tome", "tokencarve", "prumerge_plus"]

    (own,) = show_images(run_config(place), files(place, 0), names=names)
    (asked,) = show_images(run_config(place), files(place, 0), names=names, keep=0.5)

    assert [carving.name for carving in own.carvings] == names
    assert [len(carving.positions) for carving in own.carvings[:2]] == [4, 4]
    assert [len(carving.positions) for carving in asked.carvings[:2]] == [8, 8]
    assert own.carvings[1].note == "attention_weight 0.5, keep_tokens 4"
    assert asked.carvings[1].note == "attention_weight 0.5, keep_ratio 0.5"
    assert asked.carvings[0].note == "keep_ratio 0.5"


def test_a_carver_whose_signals_the_encoder_lacks_is_named(place: Path) -> None:
    config = run_config(place)

    with pytest.raises(MissingSignalError, match=r"carver 'zoo_prune' needs projector_sensitivity"):
        show_images(config, files(place, 0), names=["tome", "zoo_prune"])


@pytest.mark.parametrize("keep", [0.0, 1.5])
def test_a_share_out_of_range_is_refused(place: Path, keep: float) -> None:
    with pytest.raises(ConfigError, match=r"above 0 and at most 1"):
        show_images(run_config(place), files(place, 0), keep=keep)
    with pytest.raises(ConfigError, match=r"above 0 and at most 1"):
        show_row(str(place / "cache"), KEY, files(place, 1), keep=keep)


@dataclass(kw_only=True)
class TiledEncoder(FakeEncoder):
    """A thumbnail and its left and right half as tiles, one below the other."""

    def preprocess(self, image: Pixels) -> Pixels:
        thumbnail = super().preprocess(image)
        left, right = np.array_split(image, 2, axis=1)
        tiles = [super(TiledEncoder, self).preprocess(half) for half in (left, right)]
        return np.concatenate([thumbnail, *tiles])

    def encode_pixels(self, prepared: Sequence[Pixels]) -> list[VisualTokens]:
        views = [view for stack in prepared for view in np.split(stack, 3)]
        (tokens,) = super().encode_pixels(views)
        folded = tokens.features.view(len(prepared), 3 * self.side**2, -1)
        layout = TileLayout(rows=1, columns=2, unpadded=(0, self.side, 0, 2 * self.side))
        return [
            replace(
                tokens,
                features=folded,
                signals={n: s.reshape(*folded.shape[:2]) for n, s in tokens.signals.items()},
                image_indices=tuple(range(len(prepared))),
                num_views=3,
                tiles=layout,
            )
        ]


def test_the_tiles_of_an_image_are_drawn_with_their_tokens(place: Path) -> None:
    encoder = TiledEncoder()
    pixels = encoder.preprocess(decode_image((place / "0.jpg").read_bytes(), key="k"))

    (shown,) = show_images(
        run_config(place), files(place, 0), names=["globalcom2", "uniform_grid"], encoder=encoder
    )

    assert shown.seen.num_tokens == 48
    assert np.array_equal(np.concatenate([np.asarray(v) for v in shown.seen.views]), pixels)
    assert shown.seen.tiles == TileLayout(rows=1, columns=2, unpadded=(0, 4, 0, 8))
    assert max(shown.carvings[1].positions) >= 16
    assert "of 48 kept" in check_page(render_shown([shown])).text


def test_a_stored_row_is_drawn_from_the_cache_over_what_the_model_saw(place: Path) -> None:
    (fresh,) = show_images(run_config(place), files(place, 1))

    row = show_row(str(place / "cache"), KEY, files(place, 1))

    assert row.carvings[0].positions == fresh.carvings[0].positions
    assert row.carvings[0].sizes == pytest.approx(fresh.carvings[0].sizes)
    assert row.seen.views[0].tobytes() == fresh.seen.views[0].tobytes()
    assert row.carvings[0].name == "tokencarve"
    assert "packed by int8" in row.carvings[0].note
    assert "not the very file" not in row.note


def test_fewer_tokens_of_a_row_are_its_most_important_ones(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = show_row(str(place / "cache"), KEY, files(place, 1))
    part = show_row(str(place / "cache"), KEY, files(place, 1), keep=0.125)

    assert len(part.carvings[0].positions) == 2
    assert set(part.carvings[0].positions) < set(whole.carvings[0].positions)


def test_without_a_model_the_fit_says_how_the_image_lies(place: Path, tmp_path: Path) -> None:
    """The picture is 48 x 40: cropped it loses left and right, padded it gets grey bars."""
    url = str(place / "cache")
    shown = {
        fit: show_row(url, KEY, files(place, 1), fit=fit)  # type: ignore[arg-type]
        for fit in ("crop", "pad", "stretch")
    }
    corners = {fit: image.seen.views[0].getpixel((0, 0)) for fit, image in shown.items()}

    assert {image.seen.views[0].size for image in shown.values()} == {(96, 96)}
    assert corners["pad"] == (122, 116, 104)
    assert corners["crop"] != corners["stretch"] != corners["pad"]


def test_a_cache_whose_model_is_gone_or_another_asks_for_the_fit(
    place: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "model"
    (place / "model").rename(moved)
    try:
        with pytest.raises(ConfigError, match=r"is not to be had .*; give --fit crop"):
            show_row(str(place / "cache"), KEY, files(place, 1))
        save_vit(place / "model", "dinov2")
        with pytest.raises(ConfigError, match=r"not the one that filled the cache \(other digest"):
            show_row(str(place / "cache"), KEY, files(place, 1))
    finally:
        if (place / "model").exists():
            (place / "model").rename(tmp_path / "other")
        moved.rename(place / "model")


def test_an_image_of_another_size_is_refused_and_another_file_is_told(
    place: Path, tmp_path: Path
) -> None:
    (tmp_path / "large.jpg").write_bytes(encoded_image(1, size=(90, 40)))

    with pytest.raises(ConfigError, match=r"90 x 40 pixels and the image of 's0-i001' had 48 x 40"):
        show_row(str(place / "cache"), KEY, [str(tmp_path / "large.jpg")])
    other = show_row(str(place / "cache"), KEY, files(place, 2))

    assert "2.jpg is not the very file that was carved" in other.note


def test_an_unknown_key_and_too_many_images_are_refused(place: Path) -> None:
    with pytest.raises(KeyNotFoundError):
        show_row(str(place / "cache"), "nobody", files(place, 1))
    with pytest.raises(ConfigError, match=r"2 images for a row of 1 views"):
        show_row(str(place / "cache"), KEY, files(place, 1, 1))


@dataclass(kw_only=True)
class ClipEncoder(FakeEncoder):
    """Three frames: the image, upside down, and grey; one below the other."""

    def preprocess(self, image: Pixels) -> Pixels:
        frame = super().preprocess(image)
        return np.concatenate([frame, frame[::-1], np.full_like(frame, 128)])

    def encode_pixels(self, prepared: Sequence[Pixels]) -> list[VisualTokens]:
        frames = [frame for stack in prepared for frame in np.split(stack, 3)]
        (tokens,) = super().encode_pixels(frames)
        return [
            VisualTokens(
                features=tokens.features.view(len(prepared), 3 * self.side**2, -1),
                grid=tokens.grid,
                image_indices=tuple(range(len(prepared))),
                num_views=3,
            )
        ]


def test_frames_of_a_stored_clip_are_given_one_by_one(place: Path, tmp_path: Path) -> None:
    values = {
        "encoder": {"name": "llava"},
        "carver": {"name": "uniform_grid", "options": {"keep_tokens": 6}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    config = load_config(
        tmp_path / "run.yaml",
        input_shards=str(place / "corpus"),
        output_url=str(tmp_path / "cache"),
    )
    fill_cache(resolve_job(config, encoder=ClipEncoder()))

    shown = show_row(str(tmp_path / "cache"), KEY, files(place, 1, 2, 0), fit="stretch")

    assert len(shown.seen.views) == 3
    assert {position // 16 for position in shown.carvings[0].positions} == {0, 1, 2}
    with pytest.raises(ConfigError, match=r"one image cannot be cut into the 3 views"):
        show_row(str(tmp_path / "cache"), KEY, files(place, 1), fit="stretch")


def test_a_page_escapes_what_it_is_given_and_needs_no_other_file() -> None:
    seen = seen_image(np.zeros((8, 8, 3), dtype=np.uint8), (2, 2))
    carving = Carving(name="<b>x", note='"<script>"', positions=[0, 3], sizes=[2.0, 1.0])

    page = render_shown(
        [ShownImage(name="<script>alert(1)</script>", note="a & b", seen=seen, carvings=[carving])]
    )

    text = check_page(page).text
    assert "<script>alert(1)</script>" in text
    assert "2 of 4 kept, 1 merged, 1 dropped" in text


def test_the_command_writes_a_page_and_a_picture(place: Path, tmp_path: Path) -> None:
    given = ("--config", place / "run.yaml", "--carvers", "tokencarve,random", "--keep", "1/4")
    page = carve_show(*files(place, 0, 1), *given, "--output", tmp_path / "show.html")
    sheet = carve_show(*files(place, 0, 1), *given, "--output", tmp_path / "show.png")

    assert page.exit_code == 0, page.output
    assert page.stdout == f"2 images drawn: {tmp_path / 'show.html'}\n"
    assert len(check_page((tmp_path / "show.html").read_text()).sources) == 6
    assert sheet.exit_code == 0, sheet.output
    (shown,) = show_images(run_config(place), files(place, 1), names=["random"], keep=0.25)
    drawn = draw_tokens(shown.seen, shown.carvings[0].positions, shown.carvings[0].sizes)
    with Image.open(tmp_path / "show.png") as image:
        assert contains(np.asarray(image), np.asarray(drawn))


def test_the_panels_of_a_clip_stand_below_each_other_in_a_picture(tmp_path: Path) -> None:
    seen = seen_image(np.zeros((8 * 224, 224, 3), dtype=np.uint8), (14, 14), num_views=8)
    carving = Carving(name="c", note="", positions=[0], sizes=[1.0])
    shown = ShownImage(name="clip", note="", seen=seen, carvings=[carving])

    write_shown([shown], tmp_path / "clip.png")

    (panel, _) = shown.panels()
    with Image.open(tmp_path / "clip.png") as image:
        assert panel.image.width <= image.width < panel.image.width + 100
        assert image.height > 2 * panel.image.height


def contains(sheet: Pixels, part: Pixels) -> bool:
    """Return whether a picture stands in another, pixel for pixel."""
    height, width = part.shape[:2]
    starts = np.argwhere((sheet[: 1 - height, : 1 - width] == part[0, 0]).all(axis=-1))
    return any(
        np.array_equal(sheet[top : top + height, left : left + width], part)
        for top, left in starts
        if np.array_equal(sheet[top, left : left + width], part[0])
    )


def test_the_command_draws_a_stored_row(place: Path, tmp_path: Path) -> None:
    result = carve_show(
        *(place / "cache", KEY, "--image", *files(place, 1)),
        *("--fit", "crop", "--output", tmp_path / "row.html"),
    )

    assert result.exit_code == 0, result.output
    assert "4 of 16 kept" in check_page((tmp_path / "row.html").read_text()).text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a.jpg", "--output", "x.gif"), "the suffix must be one of .html, .htm, .png"),
        (("a.jpg", "--output", "x.png"), "give --config and images, or a cache's URL"),
        (("u", "k", "--carvers", "tome", "--output", "x.png"), "--carvers goes with --config"),
        (("a.jpg", "--config", "c.yaml", "--image", "b", "--output", "x.png"), "--image goes with"),
        (("a.jpg", "--keep", "half", "--output", "x.png"), "'half' is no share: expected"),
        (("a.jpg", "--config", "none.yaml", "--output", "x.png"), "cannot read config none.yaml"),
    ],
)
def test_a_wrong_call_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = carve_show(*arguments)

    assert result.exit_code == ExitCode.CONFIG
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1
