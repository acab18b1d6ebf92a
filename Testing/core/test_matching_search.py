"""Nearest-neighbour search: the fast answers are those of a plain comparison with every body cell."""

import numpy as np
import pytest
from matching_fields import CHANNELS, brute_force, cell_mm, make, unit

from uae.errors import InputError
from uae.matching import mutual_matches, nearest, search_index, similarity_map
from uae.matching import search as search_module


def noisy_queries(embedding, count, noise, seed=0):
    """Descriptors of random body cells with unit noise in every head: the cosine to the right cell is about
    1 / sqrt(1 + noise^2)."""
    rng = np.random.default_rng(seed)
    cells = np.argwhere(embedding.body)[rng.choice(int(embedding.body.sum()), count, replace=False)]
    clean = embedding.cell_descriptors(cells)
    heads = [clean[:, :CHANNELS], clean[:, CHANNELS:]]
    heads = [unit(unit(h) + noise * unit(rng.normal(size=h.shape))) for h in heads]
    return (np.hstack(heads) / np.sqrt(2)).astype(np.float32), cells


@pytest.fixture(scope="module")
def torso():
    shape = (40, 40, 48)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    body = (y**2 + x**2 < 0.95) & (np.abs(z) < 0.97)
    return make(shape, origin=(-90.0, 37.0, -400.0), body=body)


@pytest.mark.parametrize("noise", [0.0, 0.6, 1.3])
def test_matching_fast_search_gives_the_exhaustive_answer(torso, noise):
    queries, _ = noisy_queries(torso, 400, noise)
    index = search_index(torso)
    scores, places = brute_force(torso, queries)
    rows, found = index.best(queries)
    same = np.linalg.norm(index.points_mm[rows] - places[scores.argmax(1)], axis=1) < 1e-6
    assert same.mean() >= 0.99
    np.testing.assert_allclose(found[same], scores.max(1)[same], atol=2e-3)
    rows, _ = index.best(queries, exhaustive=True)
    assert np.mean(np.linalg.norm(index.points_mm[rows] - places[scores.argmax(1)], axis=1) < 1e-6) >= 0.995


def test_matching_fast_search_skips_most_cells(torso, monkeypatch):
    queries, _ = noisy_queries(torso, 200, 0.5)
    index = search_index(torso)
    looked = []
    look = search_module._Task._look
    monkeypatch.setattr(
        search_module._Task,
        "_look",
        lambda task, begin, values, asked: (looked.append(len(values) * len(asked)), look(task, begin, values, asked)),
    )
    index.best(queries)
    assert sum(looked) < 0.5 * len(queries) * len(index.cells)


def test_matching_index_holds_the_embedding_s_own_descriptors(torso):
    index = search_index(torso)
    assert len(index.cells) == torso.body.sum() and np.all(torso.body[tuple(index.cells.T)])
    np.testing.assert_allclose(index.descriptors, torso.cell_descriptors(index.cells), atol=1e-3)
    np.testing.assert_allclose(index.points_mm[::1000], [cell_mm(torso, cell) for cell in index.cells[::1000]])
    assert search_index(torso) is index


def test_matching_search_away_from_a_place(torso):
    queries, cells = noisy_queries(torso, 100, 0.4)
    index = search_index(torso)
    around = np.array([cell_mm(torso, cell) for cell in cells])
    scores, places = brute_force(torso, queries)
    apart = np.linalg.norm(places[None] - around[:, None], axis=2)
    scores[apart <= 20.0] = -np.inf
    rows, found = index.best(queries, far_from_mm=around, far_mm=20.0)
    assert np.all(np.linalg.norm(index.points_mm[rows] - around, axis=1) > 20.0)
    assert np.mean(np.abs(found - scores.max(1)) < 2e-3) >= 0.99


@pytest.mark.parametrize("weight", [0.003, 0.03, 0.1, 1.0])
def test_matching_guided_search_is_exact(torso, weight):
    queries, cells = noisy_queries(torso, 60, 1.0)
    rng = np.random.default_rng(5)
    predicted = np.array([cell_mm(torso, cell) for cell in cells]) + rng.normal(0, 15, (len(cells), 3))
    predicted[:5] += 300.0
    index = search_index(torso)
    scores, places = brute_force(torso, queries)
    objective = scores - weight * np.sum((places[None] - predicted[:, None]) ** 2, axis=2) / 100.0
    rows, found = index.best_near(queries, predicted, weight)
    got = found - weight * np.sum((index.points_mm[rows] - predicted) ** 2, axis=1) / 100.0
    np.testing.assert_allclose(got, objective.max(1), atol=2e-3)


def test_matching_subcell_maximum_recovers_places_between_cells():
    template, query = make(), make(origin=(1.3, -0.7, 2.1))
    points = np.random.default_rng(0).uniform(16, 76, (200, 3))
    refined, scores = nearest(template, query, points)
    plain, _ = nearest(template, query, points, refine=False)
    error, plain_error = (np.linalg.norm(p - points, axis=1) for p in (refined, plain))
    assert np.median(error) < 0.4 < np.median(plain_error)
    assert error.max() < 2.0
    assert np.all(np.abs(refined - plain) <= 2.0 + 1e-9)
    assert scores.min() > 0.95


def test_matching_identity_is_within_half_a_voxel():
    embedding = make()
    points = np.random.default_rng(1).uniform(4, 88, (100, 3))
    places, _ = nearest(embedding, embedding, points)
    assert np.linalg.norm(places - points, axis=1).max() < 1.0


def test_matching_ignores_air_and_invalid_cells():
    template = make()
    body = np.ones((24, 24, 24), bool)
    body[:, :, 12:] = False
    query = make(body=body)
    points = np.array([[70.0, 50.0, 50.0]])
    places, scores = nearest(template, query, points)
    assert places[0, 0] <= cell_mm(query, (0, 0, 11))[0] + 2.0
    assert scores[0] < 0.9


def test_matching_needs_a_body():
    with pytest.raises(InputError, match="body"):
        nearest(make(), make(body=np.zeros((24, 24, 24), bool)), np.full((1, 3), 40.0))


def test_matching_mutual_matches_agree_with_truth_and_plain_search():
    def turn(points):
        return (points - 48.0) @ np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]]).T + 48.0

    a, b = make(noise=0.2), make((16, 24, 24), origin=(0.0, 0.0, 24.0), to_anatomy=turn)
    points = np.random.default_rng(2).uniform(4, 90, (300, 3))
    source, places, scores, cycle = mutual_matches(a, b, points)
    assert np.array_equal(source, points)
    assert scores.shape == cycle.shape == (300,)
    mutual = cycle <= 8.0
    back = (points - 48.0) @ np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]]) + 48.0
    inside = np.all((back > [4, 4, 28]) & (back < [88, 88, 84]), axis=1)
    assert mutual[inside].mean() > 0.95
    assert np.median(np.linalg.norm(places[inside] - back[inside], axis=1)) < 1.0
    outside = np.any((back < [-8, -8, 16]) | (back > [104, 104, 96]), axis=1)
    assert outside.sum() > 20
    assert mutual[outside].mean() < 0.2
    scores, cells = brute_force(a, b.descriptors(places))
    plain = np.linalg.norm(cells[scores.argmax(1)] - points, axis=1)
    assert np.mean(np.abs(plain - cycle) <= 2.0 * np.sqrt(3) + 1e-6) >= 0.99


def test_matching_similarity_map_lies_on_the_fine_grid():
    body = np.ones((24, 24, 24), bool)
    body[0] = False
    template, query = make(), make(origin=(4.0, 0.0, 0.0), body=body)
    point = cell_mm(template, (10, 11, 12))
    volume = similarity_map(template, query, point)
    assert volume.array.shape == (24, 24, 24)
    assert np.all(volume.array[0] == -1)
    scores, _ = brute_force(query, template.descriptors(point[None]))
    np.testing.assert_allclose(volume.array[body], scores[0], atol=2e-3)
    peak = np.argwhere(volume.array == volume.array.max())[0]
    assert np.allclose(volume.geometry.index_to_mm(peak[None, ::-1].astype(float))[0], point)


def test_matching_fast_search_of_another_person_gives_the_exhaustive_answer(torso):
    def turn(points):
        return points @ np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]]).T + 5.0

    other = make((24, 24, 24), origin=(-40.0, 90.0, -350.0), to_anatomy=turn, noise=1.0)
    points = np.random.default_rng(7).uniform([-36, 94, -346], [50, 180, -260], (300, 3))
    queries = other.descriptors(points)
    index = search_index(torso)
    scores, places = brute_force(torso, queries)
    rows, found = index.best(queries)
    assert np.median(found) < 0.9
    assert np.mean(np.linalg.norm(index.points_mm[rows] - places[scores.argmax(1)], axis=1) < 1e-6) >= 0.99


def test_search_near_with_a_largest_penalty_equals_looking_everywhere():
    rng = np.random.default_rng(5)
    index = search_index(make())
    rows = rng.integers(0, len(index.cells), 40)
    queries = index.descriptors[rows].astype(np.float32)
    queries += rng.normal(0, 0.05, queries.shape).astype(np.float32)
    predicted = index.points_mm[rows] + rng.normal(0, 25.0, (40, 3))
    weight, most = 0.1, 0.2
    found, scores = index.best_near(queries, predicted, weight, most)
    far = 0
    for i, query in enumerate(queries):
        values = index.scores(query)
        penalty = np.minimum(weight * np.sum((index.points_mm - predicted[i]) ** 2, axis=1) / 100.0, most)
        assert values[found[i]] - penalty[found[i]] >= (values - penalty).max() - 1e-3
        assert scores[i] == pytest.approx(values[found[i]], abs=1e-3)
        far += np.linalg.norm(index.points_mm[found[i]] - predicted[i]) > 10 * np.sqrt(most / weight)
    assert 0 < far < 40
