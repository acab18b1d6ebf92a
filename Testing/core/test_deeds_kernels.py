"""Kernels of DEEDS against literal, slow implementations written from the papers' definitions."""

import itertools

import numpy as np
import pytest
from scipy import ndimage
from scipy.sparse.csgraph import minimum_spanning_tree

from uae.deeds import fields
from uae.deeds.backend import numba_kernels
from uae.deeds.cost import ControlGrid, block_samples, data_cost
from uae.deeds.mind import NEUTRAL_WORD, mind_ssc, popcount, popcount_table, unpack
from uae.deeds.polish import Bending, polish
from uae.deeds.presets import Level, Preset
from uae.deeds.tree import Tree, build_tree, edge_differences, propagate

BACKENDS = ["numpy", pytest.param("numba", marks=pytest.mark.skipif(numba_kernels() is None, reason="no numba"))]


def texture(shape, seed=0, sigma=1.5):
    noise = np.random.default_rng(seed).standard_normal(shape)
    return (ndimage.gaussian_filter(noise, sigma) * 1000).astype(np.float32)


def random_words(shape, seed):
    levels = np.random.default_rng(seed).integers(0, 6, (*shape, 12)).astype(np.uint64)
    codes = (np.uint64(1) << levels) - np.uint64(1)
    return np.bitwise_or.reduce(codes << (np.uint64(5) * np.arange(12, dtype=np.uint64)), axis=-1)


def literal_levels(image, q, z, y, x):
    """Levels of one voxel: twelve patch distances between non-opposite face neighbours, as plain loops."""
    image = image.astype(np.float64)

    def inside(p):
        return all(0 <= c < n for c, n in zip(p, image.shape))

    def distance(anchor, offset):
        if not inside(anchor):
            anchor = (z, y, x)
        total = 0.0
        for d in itertools.product(range(-q, q + 1), repeat=3):
            here = tuple(a + b for a, b in zip(anchor, d))
            there = tuple(a + q * b for a, b in zip(here, offset))
            if inside(here) and inside(there):
                total += (image[there] - image[here]) ** 2
        return total

    faces = [tuple(s * int(axis == a) for a in range(3)) for axis in range(3) for s in (-1, 1)]
    # Each pair (a, b) is read at a, its offset is b - a; which end is the anchor follows the original's table.
    pairs = set()
    for p, anchors in {
        (0, 1, 1): [(0, -1, 0), (0, 0, -1)],
        (0, 1, -1): [(0, -1, 0), (0, 0, 1)],
        (1, -1, 0): [(-1, 0, 0), (0, 1, 0)],
        (1, 0, -1): [(-1, 0, 0), (0, 0, 1)],
        (1, 1, 0): [(-1, 0, 0), (0, -1, 0)],
        (1, 0, 1): [(-1, 0, 0), (0, 0, -1)],
    }.items():
        for a in anchors:
            b = tuple(u + v for u, v in zip(a, p))
            assert a in faces and b in faces
            pairs.add((a, b))
    assert len({frozenset(pair) for pair in pairs}) == 12
    values = []
    for a, b in pairs:
        anchor = (z + q * a[0], y + q * a[1], x + q * a[2])
        values.append(distance(anchor, tuple(v - u for u, v in zip(a, b))))
    values = np.array(values) - min(values)
    noise = max(values.mean(), 1e-6)
    similarity = np.exp(-values / noise)
    return sorted(int(np.sum(similarity[i] > (np.arange(5) + 1.5) / 6)) for i in range(12))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("q", [1, 2, 3])
def test_deeds_mind_equals_literal_definition(backend, q):
    image = texture((13, 15, 14), seed=q)
    levels = unpack(mind_ssc(image, q, backend=backend))
    rng = np.random.default_rng(1)
    voxels = [tuple(rng.integers(0, n) for n in image.shape) for _ in range(120 // (q * q))]
    voxels += [(0, 0, 0), (12, 14, 13), (0, 7, 13)]
    wrong = sum(sorted(levels[v]) != literal_levels(image, q, *v) for v in voxels)
    assert wrong <= 1  # a value may lie on a threshold within the rounding of float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_deeds_mind_slabs_and_contrast_change_nothing(backend, monkeypatch):
    image = texture((20, 12, 11))
    whole = mind_ssc(image, 3, backend=backend)
    monkeypatch.setattr("uae.deeds.mind._SLAB_VOXELS", 500)
    np.testing.assert_array_equal(mind_ssc(image, 3, backend=backend), whole)
    inverted = mind_ssc(-2 * image + 512, 3, backend=backend)
    assert np.mean(inverted == whole) > 0.999


def test_deeds_mind_backends_are_equal_and_mask_is_neutral():
    image = texture((17, 19, 21))
    valid = np.zeros(image.shape, bool)
    valid[3:12] = True
    words = mind_ssc(image, 2, valid=valid, backend="numpy")
    assert (words[~valid] == NEUTRAL_WORD).all()
    assert (unpack(NEUTRAL_WORD) == 3).all()
    if numba_kernels() is not None:
        np.testing.assert_array_equal(mind_ssc(image, 2, valid=valid, backend="numba"), words)


def test_deeds_hamming_is_level_distance():
    a, b = random_words((500,), 1), random_words((500,), 2)
    expected = np.abs(unpack(a) - unpack(b)).sum(axis=-1)
    np.testing.assert_array_equal(popcount(a ^ b), expected)
    np.testing.assert_array_equal(popcount_table(a ^ b), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("border", ["neutral", "edge"])
@pytest.mark.parametrize("sampling", ["original", "stride2"])
@pytest.mark.parametrize(
    ("step", "radius", "quantisation", "alignment"),
    [(8, 1, 5, "centre"), (7, 2, 4, "corner"), (6, 1, 3, "centre"), (5, 2, 2, "centre"), (4, 2, 1, "corner"),
     (3, 1, 1, "centre")],
)  # fmt: skip
def test_deeds_cost_equals_brute_force(backend, border, sampling, step, radius, quantisation, alignment):
    shape = (25, 27, 30)
    level = Level(step, radius, quantisation)
    preset = Preset("test", (level,), "test", alpha=1.6, sampling=sampling, border=border, alignment=alignment)
    grid = ControlGrid.over(shape, step, alignment)
    fixed, moving = random_words(shape, 3), random_words(shape, 4)
    cost = data_cost(fixed, moving, grid, level, preset, backend=backend)
    assert cost.shape == (grid.nodes, level.labels)
    fixed_levels, moving_levels = unpack(fixed), unpack(moving)
    rng = np.random.default_rng(5)
    corner_nodes = [(0, 0, 0), tuple(n - 1 for n in grid.counts)]
    nodes = corner_nodes + [tuple(int(rng.integers(0, n)) for n in grid.counts) for _ in range(4)]
    for node in nodes:
        for label in [0, level.labels - 1, level.labels // 2, *rng.integers(0, level.labels, 5)]:
            steps = np.array(np.unravel_index(label, (level.side,) * 3)) - radius
            distances = []
            for s in itertools.product(range(step), repeat=3):
                if step > 4 and (s[0] % 2 or s[1] % 2 or (s[2] % 2 and sampling == "stride2")):
                    continue
                if step == 4 and sampling == "stride2" and sum(s) % 2:
                    continue
                here = tuple(o + n * step + k for o, n, k in zip(grid.offset, node, s))
                there = np.array(here) + steps * quantisation
                clipped = np.clip(there, 0, np.array(shape) - 1)
                other = moving_levels[tuple(clipped)]
                if border == "neutral" and (clipped != there).any():
                    other = np.full(12, 3)
                distances.append(np.abs(fixed_levels[here] - other).sum())
            expected = 0.5 * step / (1.6 * quantisation) * np.mean(distances)
            number = np.ravel_multi_index(node, grid.counts)
            assert cost[number, label] == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(numba_kernels() is None, reason="no numba")
@pytest.mark.parametrize("sampling", ["original", "stride2"])
def test_deeds_backends_give_equal_costs_and_labels(sampling):
    image = texture((33, 30, 35), sigma=2)
    level = Level(5, 2, 2)
    preset = Preset("test", (level,), "test", sampling=sampling)
    grid = ControlGrid.over(image.shape, 5)
    words = mind_ssc(image, 2, backend="numpy")
    shifted = np.roll(words, (2, -1, 3), axis=(0, 1, 2))
    costs = [data_cost(words, shifted, grid, level, preset, backend=b) for b in ("numpy", "numba")]
    np.testing.assert_array_equal(costs[0], costs[1])
    inherited = np.random.default_rng(0).standard_normal((grid.nodes, 3))
    tree = build_tree(image, grid)
    results = [propagate(c, tree, inherited, level.side, backend=b) for c, b in zip(costs, ("numpy", "numba"))]
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-6)


def test_deeds_samples_are_those_of_the_original():
    counts = {8: 128, 7: 112, 6: 54, 5: 45, 4: 64}
    assert {step: len(block_samples(step, "original")) for step in counts} == counts


def test_deeds_tree_is_a_minimum_spanning_tree():
    image = texture((21, 26, 31))
    image[:10] = 7.0  # a constant region: equal and zero differences
    grid = ControlGrid.over(image.shape, 5)
    tree = build_tree(image, grid)
    blocks = grid.crop(image).reshape(4, 5, 5, 5, 6, 5).swapaxes(1, 2).swapaxes(3, 4).swapaxes(2, 3)
    blocks = blocks.reshape(grid.nodes, -1).astype(float)
    # Kruskal by hand over the 6-neighbourhood.
    places = np.array(list(np.ndindex(grid.counts)))
    edges = []
    for a, b in itertools.combinations(range(grid.nodes), 2):
        if np.abs(places[a] - places[b]).sum() == 1:
            edges.append((np.abs(blocks[a] - blocks[b]).mean(), a, b))
    group = list(range(grid.nodes))
    total = 0.0
    for value, a, b in sorted(edges):
        ga, gb = group[a], group[b]
        if ga != gb:
            total += value
            group = [ga if g == gb else g for g in group]
    child = tree.order[1:]
    own = np.abs(blocks[child] - blocks[tree.parent[child]]).mean(axis=1)
    assert own.sum() == pytest.approx(total, rel=1e-5)
    assert minimum_spanning_tree(edge_differences(image, grid)).sum() - len(child) == pytest.approx(total, rel=1e-5)
    np.testing.assert_allclose(tree.weight[child], np.exp(-own / (2 * image.std())), rtol=1e-4)
    # Breadth first: a parent before its children, the root in the middle.
    rank = np.empty(grid.nodes, int)
    rank[tree.order] = np.arange(grid.nodes)
    assert (rank[tree.parent[child]] < rank[child]).all()
    assert tuple(places[tree.order[0]]) == tuple(n // 2 for n in grid.counts)


def chain_tree(parents, weights):
    """A Tree from a parent list that is already in breadth-first order."""
    parent = np.array(parents)
    depth = [0]
    for node in range(1, len(parent)):
        depth.append(depth[parent[node]] + 1)
    starts = np.concatenate([[0], np.cumsum(np.bincount(depth))])
    return Tree(np.arange(len(parent)), parent, np.array(weights, np.float32), starts)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parents", [[-1, 0, 0], [-1, 0, 1], [-1, 0, 0, 1]])
def test_deeds_propagation_equals_brute_force(backend, parents):
    rng = np.random.default_rng(len(parents))
    side = 3 if len(parents) < 4 else 2
    labels = side**3
    cost = rng.uniform(0, 6, (len(parents), labels)).astype(np.float32)
    tree = chain_tree(parents, [1.0, *rng.uniform(0.2, 1.0, len(parents) - 1)])
    inherited = rng.uniform(-1, 1, (len(parents), 3))
    chosen, energy = propagate(cost.copy(), tree, inherited, side, backend=backend)
    place = np.array(list(np.ndindex(side, side, side)))
    path = np.ones(len(parents))
    for node in range(1, len(parents)):
        path[node] = path[parents[node]] * tree.weight[node]
    best, winner = np.inf, None
    for guess in itertools.product(range(labels), repeat=len(parents)):
        value = sum(path[n] * cost[n, guess[n]] for n in range(len(parents)))
        for n in range(1, len(parents)):
            p = parents[n]
            difference = place[guess[p]] - place[guess[n]] + inherited[p] - inherited[n]
            value += path[p] * (difference**2).sum()
        if value < best:
            best, winner = value, guess
    assert tuple(chosen) == winner
    assert energy == pytest.approx(best, rel=1e-5)


def test_deeds_transfer_reproduces_linear_fields_between_centres():
    shape = (40, 45, 50)
    coarse, fine = ControlGrid.over(shape, 8), ControlGrid.over(shape, 5)

    def linear(grid):
        z, y, x = np.meshgrid(*(grid.voxel_positions(a) for a in range(3)), indexing="ij")
        return np.stack([0.1 * z - 0.2 * y, 0.05 * x + 1, 0.3 * y - 0.1 * z])

    inner = (slice(None), slice(1, -1), slice(1, -1), slice(1, -1))
    np.testing.assert_allclose(fields.transfer(linear(coarse), coarse, fine)[inner], linear(fine)[inner], atol=1e-9)
    dense = fields.transfer(linear(coarse), coarse, None)
    z, y, x = 20, 17, 29
    np.testing.assert_allclose(dense[:, z, y, x], [0.1 * z - 0.2 * y, 0.05 * x + 1, 0.3 * y - 0.1 * z], atol=1e-5)


def test_deeds_transfer_of_the_original_is_corner_aligned():
    shape = (24, 24, 26)
    grid = ControlGrid.over(shape, 8, "corner")
    field = np.random.default_rng(0).standard_normal((3, *grid.counts))
    dense = fields.transfer(field, grid, None)
    np.testing.assert_allclose(dense[:, 0, 0, 0], field[:, 0, 0, 0])
    np.testing.assert_allclose(dense[:, 8, 16, 0], field[:, 1, 2, 0])
    assert grid.offset == (0, 0, 0)


def test_deeds_merge_makes_fields_inverse():
    rng = np.random.default_rng(0)
    smooth = np.stack([ndimage.gaussian_filter(rng.standard_normal((12, 13, 14)), 3) for _ in range(3)]) * 40
    other = -smooth + 0.5
    u, v = fields.merge(smooth, other, 4)
    nodes = np.stack(np.meshgrid(*(np.arange(n) for n in (12, 13, 14)), indexing="ij")).astype(float)
    back = [ndimage.map_coordinates(v[c], nodes + u / 4, order=1, mode="nearest") for c in range(3)]
    before = [ndimage.map_coordinates(other[c], nodes + smooth / 4, order=1, mode="nearest") for c in range(3)]
    inner = (slice(None), slice(3, -3), slice(3, -3), slice(3, -3))
    assert np.abs(np.array(back) + u)[inner].mean() < 0.2 * np.abs(np.array(before) + smooth)[inner].mean()


def test_deeds_invert_undoes_the_field():
    rng = np.random.default_rng(3)
    dense = np.stack([ndimage.gaussian_filter(rng.standard_normal((30, 28, 26)), 5) for _ in range(3)])
    dense = (dense * 2.5 / np.abs(dense).max()).astype(np.float32)
    inverse = fields.invert(dense, -dense, tolerance=1e-3)
    nodes = np.stack(np.meshgrid(*(np.arange(n) for n in (30, 28, 26)), indexing="ij")).astype(float)
    there = [ndimage.map_coordinates(dense[c], nodes + inverse, order=1, mode="nearest") for c in range(3)]
    assert np.abs(np.array(there) + inverse).max() < 5e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_deeds_bending_leaves_linear_fields_alone(backend):
    counts = (5, 6, 7)
    bending = Bending(counts, backend)
    z, y, x = np.meshgrid(*(np.arange(n, dtype=float) for n in counts), indexing="ij")
    np.testing.assert_allclose(bending(2 * z - y + 0.5 * x + 3)[2:-2, 2:-2, 2:-2], 0, atol=1e-9)
    assert np.vdot(x * x, bending(x * x)) > 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_deeds_bending_is_the_squared_laplacian(backend):
    counts = (3, 4, 5)
    number = int(np.prod(counts))
    laplacian = np.zeros((number, number))
    places = list(np.ndindex(counts))
    for (a, one), (b, other) in itertools.combinations(enumerate(places), 2):
        if np.abs(np.subtract(one, other)).sum() == 1:
            laplacian[a, b] = laplacian[b, a] = -1
            laplacian[a, a] += 1
            laplacian[b, b] += 1
    bending = Bending(counts, backend)
    columns = [bending(unit.reshape(counts)).ravel().copy() for unit in np.eye(number)]
    np.testing.assert_allclose(np.stack(columns), laplacian @ laplacian, atol=1e-12)
    np.testing.assert_allclose(bending.diagonal.ravel(), np.diag(laplacian @ laplacian))


def test_deeds_polish_finds_the_minimum_of_a_parabola():
    counts = (4, 5, 6)
    truth = np.array([0.3, -0.45, 0.1])
    steps = np.stack(np.meshgrid(*[[-1.0, 0.0, 1.0]] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    cost = np.tile(((steps - truth) ** 2).sum(axis=1), (int(np.prod(counts)), 1))
    present = np.full((3, *counts), 2.0)
    found = polish(cost, present, Bending(counts), 0.2)
    np.testing.assert_allclose(found, present + truth[:, None, None, None], atol=2e-3)
    # One control point without texture follows its neighbours.
    cost[37] = 0.0
    found = polish(cost, present, Bending(counts), 0.2).reshape(3, -1)
    np.testing.assert_allclose(found[:, 37] - 2.0, truth, atol=0.05)
