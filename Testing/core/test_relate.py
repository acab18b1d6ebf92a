"""The second pass: one scan embedded on the continued grid of the other, whatever its own grid is."""

import numpy as np
import pytest

from uae.embedding import embed
from uae.errors import CancelledError, InputError, ResourceError
from uae.geometry import Geometry
from uae.models import load_model
from uae.registration.adareg import AdaRegResult, estimate
from uae.registration.relate import carried, relate
from uae.transform import Rigid
from uae.volume import Volume

MOVE = Rigid.from_euler_deg(12.0, -7.0, 21.0, translation=(-40.0, 65.0, 130.0))


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(str(tiny_model))


@pytest.fixture(scope="module")
def scan(small_ct) -> Volume:
    volume = Volume.read(small_ct)
    volume.modality = "ct"
    return volume


def test_carried_grid_gives_the_same_features_of_a_turned_scan(model, scan):
    """Header turned and moved, voxels kept: on the carried grid the network sees exactly what it saw before."""
    own = embed(scan, model, cache=False)
    turned = Volume(scan.array, carried(scan.geometry, MOVE), "ct")
    again = embed(turned, model, cache=False, lattice=carried(own.geometry, MOVE))
    assert again.geometry.shape == own.geometry.shape
    np.testing.assert_allclose(again.fine.astype(float), own.fine.astype(float), atol=2e-3)
    np.testing.assert_array_equal(again.body, own.body)
    points = np.random.default_rng(0).uniform(*scan.geometry.bounds_mm(), (50, 3))
    np.testing.assert_allclose(again.descriptors(MOVE.apply(points)), own.descriptors(points), atol=5e-3)


def test_part_of_a_scan_on_the_whole_scans_grid_shares_its_coarse_cells(model, scan):
    whole = embed(scan, model, cache=False)
    shift = 5  # voxels of 4 mm: no multiple of a coarse cell
    part = Volume(
        scan.array[:, shift:, shift:].copy(),
        Geometry(
            (36, 44 - shift, 48 - shift), scan.geometry.spacing,
            scan.geometry.index_to_mm(np.array([[shift, shift, 0.0]]))[0], scan.geometry.direction,
        ),
        "ct",
    )  # fmt: skip
    own = embed(part, model, cache=False)
    again = embed(part, model, cache=False, lattice=whole.geometry)
    steps = np.asarray(model.config.coarse_stride[::-1])
    offset = whole.geometry.mm_to_index(again.geometry.origin[None])[0]
    np.testing.assert_allclose(offset / steps, np.round(offset / steps), atol=1e-6)
    assert again.geometry.contains(part.geometry.corners_mm(), margin_voxels=0.5 + 1e-3).all()
    # Away from the cut edges the features are those of the whole scan; on a grid of its own they are not.
    center = scan.geometry.center_mm()
    points = center + np.random.default_rng(1).uniform(-12, 12, (40, 3))
    same = np.einsum("nd,nd->n", whole.descriptors(points), again.descriptors(points))
    other = np.einsum("nd,nd->n", whole.descriptors(points), own.descriptors(points))
    assert same.mean() > other.mean()


@pytest.mark.parametrize("order", ["larger fixed", "smaller fixed"])
def test_second_pass_finds_a_turned_scan_exactly(model, scan, order, monkeypatch):
    """Voxels of a part of the scan under a turned and moved header: the second pass sees the very same picture.

    Random weights find nothing in a turned scan, so the first pass is given.
    """
    start = np.array([[4.0, 4.0, 0.0]])
    grid = Geometry((36, 40, 44), scan.geometry.spacing, scan.geometry.index_to_mm(start)[0], scan.geometry.direction)
    part = Volume(scan.array[:, 4:, 4:].copy(), carried(grid, MOVE), "ct")
    fixed, moving, truth = (scan, part, MOVE) if order == "larger fixed" else (part, scan, MOVE.inverse())
    embeddings = embed(fixed, model, cache=False), embed(moving, model, cache=False)
    searched = "moving" if order == "larger fixed" else "fixed"
    given = AdaRegResult("review", "", transform=truth, rigid=truth, searched=searched)

    def first_given(*arguments, first=None, **options):
        return given if first is None else estimate(*arguments, first=first, **options)

    monkeypatch.setattr("uae.registration.relate.estimate", first_given)
    one = relate(fixed, moving, *embeddings, model, cache=False, second_pass=False)
    assert one.passes == 1 and one.found is given and (one.fixed, one.moving) == embeddings
    two = relate(fixed, moving, *embeddings, model, cache=False)
    assert two.passes == 2 and set(two.seconds) == {"match", "embed_again", "match_again"}
    again, kept = (two.moving, two.fixed) if searched == "moving" else (two.fixed, two.moving)
    assert kept in embeddings and again not in embeddings
    np.testing.assert_allclose(again.geometry.direction, MOVE.matrix[:3, :3] @ kept.geometry.direction, atol=1e-9)
    points = fixed.geometry.grid_points_mm()[::97]
    error = np.linalg.norm(two.found.transform.apply(points) - truth.apply(points), axis=1)
    assert two.found.searched == searched and error.max() < 1.0


def test_no_candidate_means_no_second_pass(model, scan):
    noise = np.random.default_rng(0).normal(0, 300, scan.array.shape).astype(np.float32)
    other = scan.replace(np.where(scan.array > -500, noise, -1000).astype(np.float32))
    embeddings = embed(scan, model, cache=False), embed(other, model, cache=False)
    found = relate(scan, other, *embeddings, model, cache=False, n_points=60)
    assert found.found.verdict == "refused" and (found.passes == 1) == (found.found.rigid is None)
    with pytest.raises(CancelledError):
        relate(scan, other, *embeddings, model, cache=False, cancel=lambda: True)


@pytest.mark.parametrize("reason", ["too large", "no body", "no memory"])
def test_first_pass_stands_where_the_second_cannot_be_made(model, scan, reason, monkeypatch):
    embeddings = embed(scan, model, cache=False), embed(scan, model, cache=False)
    turn = Rigid.from_euler_deg(28.0, 28.0, 0.0) if reason == "too large" else Rigid.identity()
    given = AdaRegResult("refused", "", transform=turn, rigid=turn)
    errors = {"no body": InputError("no body was found"), "no memory": ResourceError("out of memory")}

    def first_given(*arguments, first=None, **options):
        if first is None:
            return given
        raise errors.get(reason, AssertionError("the second pass must not run"))

    monkeypatch.setattr("uae.registration.relate.estimate", first_given)
    if reason == "too large":
        monkeypatch.setattr("uae.registration.relate.GROWTH_IF_REFUSED", 1.0)
    found = relate(scan, scan, *embeddings, model, cache=False)
    assert found.passes == 1 and found.found is given and (found.fixed, found.moving) == embeddings
    assert set(found.seconds) == {"match"}
