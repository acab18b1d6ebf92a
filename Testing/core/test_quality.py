"""Quality figures against numbers worked out by hand."""

import numpy as np
import pytest

from uae import quality
from uae.errors import InputError
from uae.geometry import Geometry
from uae.transform import DisplacementField, Rigid


def test_tre_of_a_shift():
    points = np.array([[0.0, 0, 0], [10.0, 0, 0]])
    moving = points + np.array([[3.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    values = quality.tre(Rigid.identity(), points, moving)
    assert values["mean"] == pytest.approx(3.0)
    assert values["max"] == pytest.approx(5.0)
    assert values["std"] == pytest.approx(2.0)


def test_med_per_axis():
    values = quality.med(np.array([[1.0, 2.0, 2.0], [-1.0, 0.0, 0.0]]), np.zeros((2, 3)))
    assert values["mean"] == pytest.approx(2.0)
    assert (values["x"], values["y"], values["z"]) == pytest.approx((1.0, 1.0, 1.0))


def test_cpm_definitions_differ_as_published():
    truth = np.zeros((4, 3))
    found = np.array([[4.0, 0, 0], [6.0, 0, 0], [9.0, 0, 0], [10.0, 0, 0]])
    shares = quality.cpm(
        found, truth, radius_mm=np.array([4.0, 5.0, 20.0, 20.0]), size_mm=np.array([12.0, 12.0, 12.0, 12.0])
    )
    assert shares["within_limit"] == 0.75
    assert shares["dlt_at_limit"] == 0.75  # 4 <= 4, 6 > 5, 9 <= 10, 10 <= 10
    assert shares["dlt_at_radius"] == 0.5  # 4 is not below 4, 6 > 5
    assert shares["tlt_at_limit"] == 0.75
    assert shares["tlt_at_radius"] == 1.0


def test_dice_by_label():
    first, second = np.zeros((1, 2, 4), int), np.zeros((1, 2, 4), int)
    first[0, 0] = [1, 1, 2, 0]
    second[0, 0] = [1, 2, 2, 3]
    assert quality.dice(first, second) == {1: pytest.approx(2 / 3), 2: pytest.approx(2 / 3), 3: 0.0}
    assert quality.dice(first, second, labels=[7]) == {}
    with pytest.raises(InputError, match="grid"):
        quality.dice(first, second[:, :1])


def test_jacobian_counts_folding_only_inside():
    geometry = Geometry((4, 4, 6), (2.0, 1.0, 1.0), (0, 0, 0), np.eye(3))
    vectors = np.zeros((4, 4, 6, 3))
    vectors[..., 0] = -0.5 * geometry.grid_points_mm()[:, 0].reshape(geometry.shape)  # everything is halved along L
    halved = quality.jacobian_statistics(DisplacementField(vectors, geometry))
    assert (halved["median"], halved["folding"]) == (pytest.approx(0.5), 0.0)
    folded = quality.jacobian_statistics(DisplacementField(vectors * 4.0, geometry))
    assert (folded["min"], folded["folding"]) == (pytest.approx(-1.0), 1.0)
    vectors[:, :, 3:] *= 4.0
    body = np.zeros(geometry.shape, bool)
    body[:, :, :2] = True
    assert quality.jacobian_statistics(DisplacementField(vectors, geometry), body)["folding"] == 0.0
    with pytest.raises(InputError, match="empty"):
        quality.jacobian_statistics(DisplacementField(vectors, geometry), np.zeros(geometry.shape, bool))


def test_inverse_consistency_of_a_wrong_way_back():
    there = Rigid.from_euler_deg(0, 0, 30, translation=(5, 0, 0))
    points = np.random.default_rng(0).normal(size=(10, 3))
    assert quality.inverse_consistency(there, there.inverse(), points)["max"] < 1e-9
    back = Rigid.from_rotation(there.inverse().rotation, there.inverse().translation + np.array([0.0, 3.0, 4.0]))
    assert quality.inverse_consistency(there, back, points)["mean"] == pytest.approx(5.0)


def test_points_must_pair_up():
    with pytest.raises(InputError):
        quality.med(np.zeros((3, 3)), np.zeros((2, 3)))
    with pytest.raises(InputError):
        quality.tre(Rigid.identity(), np.zeros((0, 3)), np.zeros((0, 3)))
