"""The pictures with questions: the answers are right, unique, and need what is drawn."""

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from pipeline.demo.quiz import (
    FAMILIES,
    GLYPHS,
    MAX_COUNT,
    PLACES,
    SIDES,
    Quiz,
    draw_page,
    draw_quiz,
    draw_scene,
)
from pipeline.demo.quiz_drawing import COLORS, EDGE, PATTERNS, SHAPES

SEEDS = range(40)


def scenes() -> list[Quiz]:
    return [draw_scene(random.Random(seed)) for seed in SEEDS]


def test_the_same_seed_draws_the_same_picture_and_another_another() -> None:
    one, again, other = (draw_quiz(random.Random(seed)) for seed in (1, 1, 2))

    assert one.image.tobytes() == again.image.tobytes()
    assert one.questions == again.questions
    assert one.image.tobytes() != other.image.tobytes()


def test_a_picture_has_one_answer_to_each_of_its_questions() -> None:
    for quiz in scenes():
        prompts = Counter(question.prompt for question in quiz.questions)
        assert prompts and max(prompts.values()) == 1


def test_all_families_are_asked_with_answers_of_their_kind() -> None:
    known = {
        "attribute": {*COLORS, *PATTERNS},
        "count": {str(number) for number in range(1, MAX_COUNT + 1)},
        "relation": set(SIDES),
    }
    asked = [q for seed in SEEDS for q in draw_quiz(random.Random(seed)).questions]

    assert {question.family for question in asked} == set(FAMILIES)
    for question in asked:
        if question.family in known:
            assert question.answer in known[question.family]
        else:
            assert set(question.answer.split()) <= set(GLYPHS)
            assert len(question.answer.split()) == {"read": 3, "page": 2}[question.family]


def test_no_count_is_a_good_guess() -> None:
    counts = [q.answer for quiz in scenes() for q in quiz.questions if q.family == "count"]

    assert max(Counter(counts).values()) < 0.6 * len(counts)
    assert all(
        sum(q.family == "count" and q.answer == "1" for q in quiz.questions) <= 1
        for quiz in scenes()
    )


def test_a_shape_asked_to_be_counted_and_there_once_is_any_of_those() -> None:
    """Else the names in the question would tell its answer."""
    first_by_name, asked = 0, 0
    for quiz in scenes():
        kinds = Counter(item.kind for item in quiz.items if item.kind != "plate")
        single = sorted(kind for kind, number in kinds.items() if number == 1)
        for question in quiz.questions:
            if question.family == "count" and question.answer == "1":
                asked += 1
                first_by_name += single[0] in question.prompt.split()

    assert 0.1 * asked < first_by_name < 0.6 * asked


def test_answers_follow_from_where_the_items_stand() -> None:
    for quiz in scenes():
        kinds = Counter(item.kind for item in quiz.items)
        for question in quiz.questions:
            words = question.prompt.split()
            named = [item for item in quiz.items if item.kind in words and item.kind in SHAPES]
            if question.family == "count":
                assert question.answer == str(kinds[named[0].kind])
            elif question.family == "attribute":
                assert len(named) == 1
                wanted = named[0].color if "color" in words else named[0].pattern
                assert question.answer == wanted
            elif question.family == "relation":
                one, other = (next(i for i in named if i.kind == words[place]) for place in (3, -1))
                x, y = np.subtract(one.center, other.center)
                side = {"left": -x, "right": x, "above": -y, "below": y}
                assert question.answer == max(side, key=side.__getitem__)


def test_a_plate_is_asked_for_by_its_color_and_by_the_corner_it_stands_in() -> None:
    by_place = 0
    for quiz in scenes():
        plates = {item.color: item for item in quiz.items if item.kind == "plate"}
        assert len(plates) == 2
        for question in quiz.questions:
            if question.family != "read":
                continue
            place = next((p for p in PLACES if question.prompt.endswith(p)), None)
            if place is None:
                assert question.answer == plates[question.prompt.split()[-1]].text
                continue
            by_place += 1
            (found,) = (p for p in plates.values() if p.text == question.answer)
            assert ("top" in place) == (found.center[1] < EDGE / 2)
            assert ("left" in place) == (found.center[0] < EDGE / 2)
    assert by_place > 20


def test_items_do_not_touch_and_cover_5_to_40_percent() -> None:
    for quiz in scenes():
        drawn = np.zeros((EDGE, EDGE), dtype=int)
        for item in quiz.items:
            left, top, right, bottom = (round(edge) for edge in item.box)
            drawn[top:bottom, left:right] += 1
        assert drawn.max() == 1
        assert 0.05 <= drawn.mean() <= 0.40


@pytest.mark.parametrize("draw", [draw_scene, draw_page])
def test_glyphs_stand_where_they_are_said_to(draw) -> None:
    """There is an edge, dark on light or light on dark, within a few pixels of each centre."""
    for seed in SEEDS:
        quiz = draw(random.Random(seed))
        grey = np.asarray(quiz.image.convert("L"), dtype=int)
        glyphs = [glyph for item in quiz.items for glyph in item.glyphs]
        glyphs += [glyph for line in quiz.lines for glyph in line]
        assert glyphs
        for glyph in glyphs:
            x, y = (round(place) for place in glyph.center)
            around = grey[max(0, y - 5) : y + 6, max(0, x - 4) : x + 5]
            assert around.max() - around.min() > 50


def test_photographs_serve_as_backgrounds_of_half_the_scenes() -> None:
    photo = Image.new("RGB", (300, 200), (128, 0, 0))
    with_photo = [draw_scene(random.Random(seed), [photo]) for seed in SEEDS]

    red = [np.median(np.asarray(quiz.image)[..., 0]) for quiz in with_photo]
    green = [np.median(np.asarray(quiz.image)[..., 1]) for quiz in with_photo]
    share = np.mean([r - g > 40 for r, g in zip(red, green, strict=True)])

    assert 0.3 < share < 0.8
