"""Matching of points on synthetic embeddings with exact correspondence."""

import logging

import numpy as np
import pytest
from matching_fields import brute_force, cell_mm, make

from uae.errors import CancelledError, InputError
from uae.matching import FixedPointOptions, match_points
from uae.transform import Affine

LAX = {"score": 0.5, "margin": -1.0, "cycle_mm": 20.0, "fixed_points": 4, "residual_mm": 20.0}
LINEAR = np.array([[0.97, -0.2, 0.02], [0.22, 1.02, 0.0], [0.0, -0.05, 1.04]])
CENTER = np.array([48.0, 48.0, 48.0])


def to_anatomy(points):
    """From a turned and stretched subject's mm to the common anatomy's."""
    return (points - CENTER) @ LINEAR.T + CENTER


def to_subject(points):
    return (points - CENTER) @ np.linalg.inv(LINEAR).T + CENTER


def affine(linear=None, shift=(0.0, 0.0, 0.0)):
    matrix = np.eye(4)
    matrix[:3, :3] = np.eye(3) if linear is None else linear
    matrix[:3, 3] = shift
    return Affine(matrix)


PRIOR = affine(np.linalg.inv(LINEAR), CENTER - np.linalg.inv(LINEAR) @ CENTER)


@pytest.fixture(scope="module")
def subjects():
    return make(), make(to_anatomy=to_anatomy, noise=0.3)


def test_matching_identity_has_every_seed_fixed(subjects):
    template = subjects[0]
    points = np.random.default_rng(0).uniform(16, 78, (20, 3))
    for match in match_points(template, template, points, method="fixed-point", limits=LAX):
        assert np.linalg.norm(match.point_mm - match.template_mm) <= 1.0
        assert match.fixed_points == 125
        assert match.residual_mm < 0.5
        assert match.cycle_mm <= 1.0
        assert match.score > 0.99
        assert match.confident and match.method == "fixed-point"


@pytest.mark.parametrize("method", ["nearest", "fixed-point"])
@pytest.mark.parametrize("cells", [(1, 0, 0), (-2, 3, 5)])
def test_matching_shift_by_whole_cells_shifts_the_match(method, cells):
    shift = 4.0 * np.array(cells, float)[::-1]
    template, query = make(), make(to_anatomy=lambda points: points - shift)
    points = np.random.default_rng(1).uniform(28, 66, (10, 3))
    for match in match_points(template, query, points, method=method):
        assert np.linalg.norm(match.point_mm - match.template_mm - shift) <= 1.0


def test_matching_fixed_points_recover_an_affine_and_cut_the_tail(subjects):
    template, query = subjects[0], make(to_anatomy=to_anatomy, noise=0.6)
    points = np.random.default_rng(2).uniform(20, 74, (60, 3))
    errors = {}
    for method in ("nearest", "fixed-point"):
        found = np.stack([match.point_mm for match in match_points(template, query, points, method=method)])
        errors[method] = np.linalg.norm(found - to_subject(points), axis=1)
    assert np.median(errors["fixed-point"]) < 2.0
    assert errors["fixed-point"].mean() < errors["nearest"].mean()
    assert np.percentile(errors["fixed-point"], 95) < np.percentile(errors["nearest"], 95)


def test_matching_fixed_points_are_those_of_a_plain_iteration():
    template, query = make((16, 16, 16)), make((16, 16, 16), to_anatomy=to_anatomy, noise=0.6)

    def best(source, target, cell):
        scores, _ = brute_force(target, source.cell_descriptors(np.array([cell])))
        return tuple(np.argwhere(target.body)[scores[0].argmax()])

    fixed = set()
    for step in np.ndindex(3, 3, 3):
        seed = tuple(np.array((8, 7, 9)) + np.array(step) - 1)
        for _ in range(10):
            image = best(template, query, seed)
            back = best(query, template, image)
            if back == seed:
                fixed.add((seed, image))
                break
            seed = back
    match = match_points(template, query, cell_mm(template, (8, 7, 9))[None], method="fixed-point", side=3)[0]
    assert abs(match.fixed_points - len(fixed)) <= 1
    assert 4 <= match.fixed_points < 27


def test_matching_released_mode_keeps_what_does_not_stand_still(subjects):
    template, query = subjects[0], make(to_anatomy=to_anatomy, noise=0.8)
    point = np.array([[50.0, 46.0, 44.0]])
    strict = match_points(template, query, point, method="fixed-point")[0]
    released = match_points(
        template, query, point, method="fixed-point", options=FixedPointOptions(max_round_trips=2, released=True)
    )[0]
    assert released.fixed_points >= strict.fixed_points > 4
    assert np.linalg.norm(released.point_mm - to_subject(point)[0]) < 8.0


def test_matching_relaxed_score_is_never_confident(subjects, caplog):
    template, query = subjects
    point = np.array([[50.0, 46.0, 44.0]])
    with caplog.at_level(logging.WARNING):
        match = match_points(template, query, point, method="fixed-point", limits={**LAX, "pair_score": 0.999})[0]
    assert not match.confident and "relax" in match.reason
    assert any("relaxed" in record.message for record in caplog.records)
    assert np.linalg.norm(match.point_mm - to_subject(point)[0]) < 6.0
    assert match_points(template, query, point, method="fixed-point", limits={**LAX, "pair_score": 0.3})[0].confident


def test_matching_one_slice_of_body_uses_a_plane_of_fixed_points(subjects):
    body = np.zeros((24, 24, 24), bool)
    body[12] = True
    template, query = make(body=body), make(to_anatomy=lambda points: points - [8.0, 0.0, 0.0])
    point = cell_mm(template, (12, 11, 10))
    match = match_points(template, query, point[None], method="fixed-point", limits=LAX)[0]
    assert match.fixed_points == 25
    assert np.linalg.norm(match.point_mm - point - [8.0, 0.0, 0.0]) < 1.0


def test_matching_with_too_few_seeds_falls_back_and_says_so():
    body = np.zeros((24, 24, 24), bool)
    body[12, 12, 12:14] = True
    template, query = make(body=body), make()
    match = match_points(template, query, cell_mm(template, (12, 12, 12))[None], method="fixed-point", limits=LAX)[0]
    assert match.method == "nearest" and match.fixed_points == 2 and match.residual_mm is None
    assert not match.confident and "fallback" in match.reason
    assert np.linalg.norm(match.point_mm - match.template_mm) < 1.0


def test_matching_in_air_is_flagged_and_outside_is_refused():
    body = np.ones((24, 24, 24), bool)
    body[:, :4] = False
    valid = np.ones((24, 24, 24), bool)
    valid[20:] = False
    template, query = make(body=body, valid=valid), make()
    for method in ("nearest", "fixed-point"):
        points = np.array([[50.0, 5.0, 40.0], [50.0, 60.0, 40.0]])
        air, inside = match_points(template, query, points, method=method, limits=LAX)
        assert not air.confident and "air" in air.reason
        assert "air" not in inside.reason
    for outside in ([50.0, 50.0, 90.0], [50.0, 50.0, -9.0], [1e5, 0, 0]):
        with pytest.raises(InputError, match="1 of 2 points lie outside the template scan"):
            match_points(template, query, np.array([[50.0, 60.0, 40.0], outside]))


def test_matching_refuses_bad_requests(subjects):
    template, query = subjects
    point = np.array([[50.0, 50.0, 50.0]])
    with pytest.raises(InputError, match="unknown matching method"):
        match_points(template, query, point, method="magic")
    with pytest.raises(InputError, match="register the pair"):
        match_points(template, query, point, method="guided")
    with pytest.raises(InputError, match="different models"):
        match_points(template, make(sha="1" * 64), point)
    with pytest.raises(InputError, match="odd"):
        match_points(template, query, point, side=4)
    with pytest.raises(InputError, match="labels"):
        match_points(template, query, point, labels=["a", "b"])
    for bad in (np.zeros((0, 3)), np.zeros((2, 2)), np.array([[np.nan, 0, 0]])):
        with pytest.raises(InputError):
            match_points(template, query, bad)


def test_matching_keeps_labels_and_order(subjects):
    points = np.random.default_rng(4).uniform(20, 70, (37, 3))
    labels = [f"p{i}" for i in range(37)]
    matches = match_points(*subjects, points, labels, method="nearest")
    assert [match.label for match in matches] == labels
    assert np.array_equal(np.stack([match.template_mm for match in matches]), points)


def test_matching_can_be_cancelled_and_reports(subjects):
    seen = []
    match_points(*subjects, np.full((20, 3), 50.0), method="nearest", progress=lambda stage, part: seen.append(part))
    assert seen[-1] == 1.0 and len(seen) > 1
    with pytest.raises(CancelledError):
        match_points(*subjects, np.full((1, 3), 50.0), cancel=lambda: True)


def test_matching_auto_follows_the_verdict_of_the_prior(subjects):
    point = np.array([[50.0, 50.0, 50.0]])
    for prior, verdict, method, words in (
        (None, None, "fixed-point", "free search"),
        (PRIOR, "accepted", "guided", "accepted"),
        (PRIOR, "review", "guided", "review"),
        (PRIOR, "refused", "fixed-point", "refused"),
        (PRIOR, None, "fixed-point", "free search"),
    ):
        match = match_points(*subjects, point, prior=prior, prior_verdict=verdict)[0]
        assert match.method == method and words in match.reason
    match = match_points(*subjects, point, method="guided", prior=PRIOR, prior_verdict="refused")[0]
    assert match.method == "fixed-point" and "refused" in match.reason
    match = match_points(*subjects, point, method="guided-nearest", prior=PRIOR, prior_verdict="refused")[0]
    assert match.method == "nearest" and "refused" in match.reason


def test_matching_guided_by_a_registration_for_review_is_never_confident(subjects):
    point = np.array([[50.0, 50.0, 50.0]])
    sure = match_points(*subjects, point, prior=PRIOR, prior_verdict="accepted", limits=LAX)[0]
    unsure = match_points(*subjects, point, prior=PRIOR, prior_verdict="review", limits=LAX)[0]
    assert sure.confident and not unsure.confident and "only for review" in unsure.reason
    np.testing.assert_array_equal(sure.point_mm, unsure.point_mm)


def repeating(points):
    """Anatomy that repeats every 40 mm along z within 48..128, like vertebrae one or two levels apart."""
    result = points.copy()
    result[:, 2] = np.where(points[:, 2] > 88, points[:, 2] - 40.0, points[:, 2])
    return result


@pytest.mark.parametrize("method", ["guided", "guided-nearest"])
def test_matching_guided_search_keeps_the_level_where_free_search_slips(method):
    template, query = make(), make((32, 24, 24), to_anatomy=repeating)
    level_up = affine(shift=(2.0, -2.0, 43.0))
    point = np.array([[50.0, 50.0, 68.0]])
    truth = point[0] + [0.0, 0.0, 40.0]
    free = match_points(template, query, point, method="fixed-point", limits={**LAX, "margin": 0.05})[0]
    assert np.linalg.norm(free.point_mm - point[0]) < 2.0 or np.linalg.norm(free.point_mm - truth) < 2.0
    assert free.margin < 0.05 and not free.confident and "margin" in free.reason
    assert 35.0 < np.linalg.norm(free.competitor_mm - free.point_mm) < 45.0
    match = match_points(template, query, point, method=method, prior=level_up, prior_verdict="accepted", limits=LAX)[0]
    assert match.method == method
    assert np.linalg.norm(match.point_mm - truth) < 3.0
    assert match.cycle_mm < 3.0


def test_matching_competitor_is_the_best_cell_farther_than_20_mm(subjects):
    template, query = subjects
    points = np.random.default_rng(6).uniform(20, 74, (20, 3))
    descriptors = template.descriptors(points)
    scores, places = brute_force(query, descriptors)
    for i, match in enumerate(match_points(template, query, points, method="fixed-point")):
        far = np.linalg.norm(places - match.point_mm, axis=1) > 20.0
        assert match.competitor_score == pytest.approx(scores[i][far].max(), abs=2e-3)
        assert np.linalg.norm(match.competitor_mm - match.point_mm) > 20.0
        assert match.margin == pytest.approx(match.score - match.competitor_score)


def test_matching_prediction_outside_the_query_is_never_confident(subjects):
    point, prior = np.array([[50.0, 50.0, 50.0]]), affine(shift=(0.0, 0.0, 70.0))
    match = match_points(*subjects, point, prior=prior, prior_verdict="accepted", limits=LAX)[0]
    assert not match.confident and "outside the query scan" in match.reason


def test_matching_without_a_far_cell_has_no_competitor_and_no_margin():
    body = np.zeros((24, 24, 24), bool)
    body[11:14, 11:14, 11:14] = True
    template, query = make(), make(body=body)
    point = cell_mm(query, (12, 12, 12))[None]
    match = match_points(template, query, point, method="nearest", limits={"margin": 0.0})[0]
    assert match.competitor_mm is None and match.competitor_score is None and match.margin is None
    assert not match.confident
