"""Studies on test subjects, organs by prototypes and real MR, on cases made by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from matching_fields import Field, unit
from study_parts import MARKS, SHIFT, box_labels, setup, shuffled, two_scans

from uae.bench import real_mr
from uae.bench.organs import class_means, class_points, classify, head_vectors, nearest_class, summarise_organs
from uae.bench.real_mr import hounsfield_from_cormack, measure_real_mr, moved, summarise_real_mr
from uae.bench.study import Setup
from uae.geometry import Geometry
from uae.lookup import level_geometry
from uae.transform import Rigid
from uae.volume import Volume


@pytest.fixture(scope="module")
def pair():
    return two_scans()


def test_class_points_go_through_millimetres():
    """A label map stored with another y direction names the same places."""
    plain_map, flipped = box_labels(), box_labels(flip=True)
    assert not np.array_equal(plain_map.array, flipped.array)
    names = {1: "a", 2: "b", 3: "absent"}
    for one, two in zip(class_points(plain_map, names).values(), class_points(flipped, names).values()):
        assert one[1] == two[1] == 6 * 7 * 8
        np.testing.assert_allclose(np.sort(one[0], axis=0), np.sort(two[0], axis=0))
    both = class_points(flipped, {1: "kidney", 2: "kidney"}, most=50)
    assert list(both) == ["kidney"] and both["kidney"][1] == 2 * 336 and len(both["kidney"][0]) == 50


def test_nearest_class_is_the_largest_cosine_and_air_has_none():
    means = {"a": np.array([1.0, 0.0]), "b": np.array([0.6, 0.8])}
    vectors = np.array([[5.0, 1.0], [0.1, 0.1], [0.0, 0.0]])
    assert list(nearest_class(vectors, means)) == ["a", "b", ""]


def with_semantic(embedding, field, to_anatomy=lambda p: p):
    grid = level_geometry(embedding.geometry, embedding.fine.shape[1:])
    values = unit(field(to_anatomy(grid.grid_points_mm())))
    return replace(embedding, semantic=values.T.reshape(-1, *grid.shape).astype(np.float16))


def test_organs_by_prototypes(pair):
    """Slow features tell the two boxes apart in another scan; shuffled ones do not; each head is judged by itself."""
    slow = Field(7, 60.0)
    names = {1: "left", 2: "right"}
    here = with_semantic(pair[0], slow)
    there = with_semantic(shuffled(pair[1]), slow, lambda p: p - SHIFT)
    means = class_means([(here, box_labels())], names)
    assert set(means["left"]) == {"appearance", "semantic", "all"}
    assert np.linalg.norm(means["left"]["semantic"]) == pytest.approx(1.0, abs=1e-5)
    found = classify(there, box_labels(SHIFT, flip=True), {**names, 9: "no prototype"}, means)
    assert set(found) == {"left", "right"}
    assert found["left"]["voxels"] == 336 and found["left"]["looked_at"] == 336
    figures = summarise_organs([{"kind": "k", "classes": found}])["k"]
    assert figures["semantic"]["voxel_accuracy"] == 1.0
    assert figures["appearance"]["voxel_accuracy"] < 0.8
    # The array taken for one without the flip lies elsewhere: the boxes no longer cover what they name.
    wrong = box_labels(SHIFT, flip=True)
    wrong = wrong.replace(wrong.array[:, :, ::-1].copy())
    bad = summarise_organs([{"kind": "k", "classes": classify(there, wrong, names, means)}])["k"]
    assert bad["semantic"]["voxel_accuracy"] < 0.5
    assert set(head_vectors(pair[0], MARKS["carina"][None])) == {"appearance"}


def test_organ_accuracies_weigh_voxels_and_classes():
    def entry(voxels, looked_at, right, shared):
        return {"voxels": voxels, "looked_at": looked_at, "right": {"appearance": right},
                "right_among_shared": {"appearance": shared}}  # fmt: skip

    scans = [{"a": entry(900, 10, 9, 10), "b": entry(100, 10, 1, 5)}, {"a": entry(100, 10, 4, 4)}]
    found = summarise_organs([{"kind": "k", "classes": classes} for classes in scans])["k"]["appearance"]
    assert found["voxel_accuracy"] == pytest.approx((810 + 10 + 40) / 1100)
    assert found["classes"] == pytest.approx({"a": 850 / 1000, "b": 0.1})
    assert found["class_mean"] == pytest.approx((0.85 + 0.1) / 2)
    assert found["voxel_accuracy_among_shared"] == pytest.approx((900 + 50 + 40) / 1100)


def blob(center, flip=True):
    direction = np.diag([1.0, -1.0 if flip else 1.0, 1.0])
    grid = Geometry((20, 60, 60), (1.5, 1.5, 4.0), (-40.0, 30.0, 5.0), direction)
    apart = np.linalg.norm(grid.grid_points_mm() - center, axis=1).reshape(grid.shape)
    return Volume((100.0 + 900.0 * np.exp(-((apart / 8.0) ** 2))).astype(np.float32), grid, "mr")


def test_moving_a_scan_turns_its_voxels():
    center = np.array([-10.0, -5.0, 40.0])
    scan = blob(center)
    move = Rigid.from_euler_deg(8.0, -5.0, 12.0, translation=(50.0, 0.0, -30.0), center=scan.geometry.center_mm())
    turned = moved(scan, move)
    assert np.array_equal(turned.geometry.direction, np.eye(3))
    brightest = turned.geometry.index_to_mm(np.array(np.unravel_index(turned.array.argmax(), turned.array.shape))[::-1])
    np.testing.assert_allclose(brightest[0], move.apply(center[None])[0], atol=1.5)
    assert turned.geometry.contains(move.apply(scan.geometry.corners_mm())).all()
    assert turned.modality == "mr" and turned.minimum == pytest.approx(100.0, abs=1.0)


def test_turned_pair_knows_its_truth(monkeypatch):
    """The true transform gives no error; that of an untouched header gives the shift."""
    scan = blob(np.array([0.0, -15.0, 40.0]))
    move = Rigid.from_rotation(np.eye(3), np.array([0.0, 0.0, 25.0]))
    answers = {}

    def fake_register(fixed, moving, *_, **__):
        adareg = SimpleNamespace(
            transform=answers["transform"], verdict="accepted", reason="", queried=1, mutual=1, inliers=1, features={}
        )
        return SimpleNamespace(adareg=adareg, linear=answers["transform"], refinement=None)

    monkeypatch.setattr(real_mr, "register", fake_register)
    monkeypatch.setattr(real_mr, "load_scan", lambda data, name: scan)
    monkeypatch.setattr(real_mr, "random_move", lambda center, rng: move)
    monkeypatch.setattr(Setup, "data", None)
    for transform, error in ((move, 0.0), (Rigid.identity(), 25.0), (None, np.inf)):
        answers["transform"] = transform
        found = measure_real_mr(setup(), "pelvis sag/cor #0")
        assert found["refined"]["tre_mm"] == pytest.approx(error, abs=1e-6)
        assert found["registration"]["tre_mm"] == pytest.approx(error, abs=1e-6)
        assert found["refined"]["overlap_tre_mm"] == pytest.approx(error, abs=1e-6)
        assert found["inside_fixed"] == 1.0


def test_real_mr_figures():
    limits = {"registration": {"accepted": {"inliers": {"min": 100}}, "review": {"inliers": {"min": 20}}}}

    def case(pair, tre, inliers, refined=None):
        found = {"tre_mm": tre, "features": {"inliers": inliers} if inliers else {}}
        return {
            "pair": pair,
            "registration": found,
            "refined": {"tre_mm": refined or tre, "overlap_tre_mm": refined or tre, "failed": False},
        }

    cases = [case("a", 2.0, 200, 1.0), case("a", 30.0, 200), case("b", 7.0, 50), case("b", None, 0)]
    found = summarise_real_mr(cases, limits)
    assert found["a"]["confident_failure_rate"] == 0.5 and found["a"]["refined_median_tre_mm"] == 15.5
    assert found["b"]["review_rate"] == found["b"]["refusal_rate"] == 0.5
    assert found["all"]["cases"] == 4 and found["all"]["rigid_success"] == 0.25
    assert found["all"]["confident_failure_rate"] == 0.25


def test_cormack_scale_is_undone():
    """Its published forward form: 0..1100 raw units stretched tenfold between 900 and 1100."""
    raw = np.array([0.0, 500.0, 900.0, 1000.0, 1100.0, 2000.0])
    forward = raw + 9.0 * np.clip(raw - 900.0, 0.0, 200.0)
    np.testing.assert_allclose(hounsfield_from_cormack(forward), raw - 1024.0)
