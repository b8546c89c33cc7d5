"""Means of evaluations that were made in parts."""

import json

import pyarrow.compute as pc
import pytest

from pipeline.evaluation.findings import describe, join, sum_up, summarize
from tests.evaluation.made_results import KEYS, made_answers, made_images, made_variants

VARIANTS = made_variants(["random", "tome", "divprune"])
ANSWERS, IMAGES = made_answers(VARIANTS), made_images(VARIANTS)


def part(carvers):
    tables = (ANSWERS, IMAGES)
    return sum_up(
        *(t.filter([name in carvers for name in t["carver"].to_pylist()]) for t in tables)
    )


def rows(found):
    return sorted(json.dumps(row, sort_keys=True) for row in found)  # NaN equals itself as text


def test_parts_joined_say_what_the_whole_says() -> None:
    whole = summarize(ANSWERS, IMAGES, resamples=100, seed=3)

    joined = join(
        [part(["identity", "random"]), part(["tome"]), part(["divprune", "prumerge_plus"])]
    )

    found = describe(joined, resamples=100, seed=3)
    assert rows(found["variants"]) == rows(whole["variants"])
    assert rows(found["information"]["within"]) == rows(whole["information"]["within"])
    assert found["questions"] == whole["questions"] == len(ANSWERS) // len(VARIANTS)


def test_a_variant_that_several_parts_hold_counts_once() -> None:
    joined = join([part(["identity", "random"]), part(["identity", "tome"])])

    assert [v["carver"] for v in joined.variants].count("identity") == 2  # of two codecs


def test_parts_of_different_images_are_not_joined() -> None:
    fewer = [t.filter(pc.not_equal(t["key"], KEYS[0])) for t in (ANSWERS, IMAGES)]

    with pytest.raises(ValueError, match="different images"):
        join([sum_up(ANSWERS, IMAGES), sum_up(*fewer)])
