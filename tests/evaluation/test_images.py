"""Which images are evaluated, and in which batches."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.evaluation.images import Batches, ImageSource
from pipeline.evaluation.questions import SamePrompts
from pipeline.source import SourceOptions
from pipeline.storage import open_store
from tests.fakes import encoded_image, write_corpus, write_tar

ASKED = SamePrompts(prompts=("what ?",))


def source(
    shards: Path | str = "",
    *,
    images: str = "",
    most: int | None = None,
    allowed: Sequence[str] = (),
) -> ImageSource:
    return ImageSource(
        shards=str(shards),
        images=images,
        options=SourceOptions(column_suffixes=()),
        max_images=most,
        allow_list_schemes=allowed,
    )


def keys(images: ImageSource, rejected: Counter[str] | None = None) -> list[str]:
    found = images.asked(ASKED, Counter() if rejected is None else rejected)
    return [image.sample.key for image in found]


def test_a_sample_of_the_images_is_spread_evenly_over_the_shards(tmp_path: Path) -> None:
    write_corpus(tmp_path, num_shards=4, num_images=5)

    everything, some, few = (keys(source(tmp_path, most=most)) for most in (None, 8, 2))

    assert len(everything) == 20
    assert Counter(key[:2] for key in some) == {"s0": 2, "s1": 2, "s2": 2, "s3": 2}
    assert few == ["s1-i000", "s3-i000"]


def test_a_shard_of_too_few_images_leaves_its_share_to_the_next(tmp_path: Path) -> None:
    write_corpus(tmp_path, num_shards=3, num_images=6)
    write_tar(tmp_path / "shard-00000.tar", [("only.jpg", encoded_image(1))])

    found = keys(source(tmp_path, most=9))

    assert Counter(key[:2] for key in found) == {"on": 1, "s1": 5, "s2": 3}


def test_a_key_that_comes_again_is_left_out_and_counted(tmp_path: Path) -> None:
    image = encoded_image(1)
    write_tar(tmp_path / "a.tar", [("k.jpg", image)])
    write_tar(tmp_path / "b.tar", [("k.jpg", image), ("l.jpg", image)])
    rejected = Counter[str]()

    assert keys(source(tmp_path), rejected) == ["k", "l"]
    assert rejected == {"duplicate_key": 1}


def test_shares_hold_every_batch_once_and_the_same_ones(tmp_path: Path) -> None:
    write_corpus(tmp_path, num_shards=2, num_images=7)
    whole = Batches(source=source(tmp_path), questions=ASKED, batch_size=3)
    shares = [
        Batches(source=source(tmp_path), questions=ASKED, batch_size=3, share=i, num_shares=2)
        for i in range(2)
    ]

    def numbers(batches: Batches) -> list[list[int]]:
        return [[image.number for image in batch] for batch in batches]

    first, second = (numbers(share) for share in shares)
    assert numbers(whole) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [12, 13]]
    assert (first, second) == (numbers(whole)[::2], numbers(whole)[1::2])


def test_rejected_samples_are_counted_by_one_share_alone(tmp_path: Path) -> None:
    image = encoded_image(1)
    write_tar(tmp_path / "a.tar", [("k.jpg", image), ("e.jpg", b"")])
    shares = [
        Batches(source=source(tmp_path), questions=ASKED, batch_size=3, share=i, num_shares=2)
        for i in range(2)
    ]

    for share in shares:
        list(share)

    assert [share.rejected for share in shares] == [{"empty_image": 1}, {}]


def test_a_folder_gives_its_images_by_name_and_an_empty_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b.PNG").write_bytes(encoded_image(1, kind="PNG"))
    (tmp_path / "a.jpg").write_bytes(encoded_image(2))
    (tmp_path / "c.gif").write_bytes(b"gif")

    assert keys(source(images=str(tmp_path))) == ["a", "b"]
    with pytest.raises(ConfigError, match="there is no image"):
        source(images=str(tmp_path / "*.webp")).check()


def test_a_list_on_a_store_names_another_place_only_where_that_is_allowed(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("k.jpg", encoded_image(1))])
    elsewhere = open_store("memory://evaluated")
    elsewhere.put("list.txt", str(tmp_path / "a.tar").encode())

    with pytest.raises(ConfigError, match="allow_list_schemes"):
        source(elsewhere.url + "/list.txt").check()
    assert keys(source(elsewhere.url + "/list.txt", allowed=["file"])) == ["k"]
