"""Mutual information over sampled points: hand-computed cases, and SimpleITK's estimate as an independent witness."""

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from uae.geometry import Geometry
from uae.registration.information import BINS, JointHistogram
from uae.transform import Rigid
from uae.volume import Volume

OBLIQUE = Rigid.from_euler_deg(12.0, -7.0, 20.0).rotation
GRID = Geometry((20, 30, 40), (1.5, 2.0, 3.0), (-40.0, 15.0, 210.0), OBLIQUE)


def histogram(fixed, moving, body=None):
    body = np.ones(GRID.shape, bool) if body is None else body
    return JointHistogram(fixed.ravel(), GRID.grid_points_mm(), moving.astype(np.float32), body, GRID)


def test_four_equal_classes_that_follow_each_other_share_log_4():
    classes = np.random.default_rng(0).permutation(np.arange(20 * 30 * 40) % 4).reshape(GRID.shape)
    other = np.array([3.0, 0.0, 2.0, 1.0])[classes] * (BINS - 1) / 3.0  # whole bins: nothing is shared between two
    assert histogram(classes * 10.0, np.round(other))(np.eye(4)) == pytest.approx(np.log(4.0), abs=0.01)


def test_independent_values_share_next_to_nothing():
    rng = np.random.default_rng(1)
    fixed, moving = rng.random(GRID.shape), rng.random(GRID.shape)
    # the bias of a histogram of n points in B x B cells is about (B - 1)^2 / 2n
    assert histogram(fixed, moving)(np.eye(4)) < 1.5 * (BINS - 1) ** 2 / (2 * fixed.size)


def test_points_outside_the_body_or_the_grid_are_left_out():
    rng = np.random.default_rng(2)
    fixed = ndimage.gaussian_filter(rng.random(GRID.shape), 2.0)
    body = np.zeros(GRID.shape, bool)
    body[5:15, 5:25, 5:35] = True
    outside_is_noise = np.where(body, fixed, rng.random(GRID.shape))
    inside = histogram(fixed, outside_is_noise, body)
    assert inside(np.eye(4)) == pytest.approx(histogram(fixed, fixed, body)(np.eye(4)), rel=1e-5)
    assert inside(np.eye(4)) > 2.0 * histogram(fixed, outside_is_noise)(np.eye(4))
    away = np.eye(4)
    away[:3, 3] = 500.0
    assert inside(away) == 0.0


def test_agrees_with_simpleitk_on_which_shift_is_better():
    rng = np.random.default_rng(3)
    fixed = ndimage.gaussian_filter(rng.random(GRID.shape), 2.0)
    fixed = (fixed - fixed.mean()) / fixed.std()
    moving = np.cos(2.0 * fixed)  # another contrast
    ours = histogram(fixed, moving)
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetInterpolator(sitk.sitkLinear)
    images = [Volume(array.astype(np.float32), GRID).to_sitk() for array in (fixed, moving)]
    theirs, mine = [], []
    for step in (0.0, 1.0, 2.5, 5.0, 9.0):
        matrix = np.eye(4)
        matrix[:3, 3] = step * OBLIQUE[:, 0]
        method.SetInitialTransform(Rigid(matrix).to_sitk())
        theirs.append(-method.MetricEvaluate(*images))
        mine.append(ours(matrix))
    assert np.all(np.diff(mine) < 0)
    assert np.corrcoef(theirs, mine)[0, 1] > 0.98
