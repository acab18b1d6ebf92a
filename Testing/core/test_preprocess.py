"""The network grid, modality, body mask and input maps."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from small_scans import torso_ct

from uae.errors import InputError, ModalityError
from uae.geometry import Geometry
from uae.preprocess import InputMap, body_mask, decide_modality, network_geometry, prepare
from uae.volume import Volume


def oblique(shape=(20, 30, 40), spacing=(1.5, 1.0, 4.0), flip=(1, -1, 1)) -> Geometry:
    direction = Rotation.from_euler("xyz", [20, -10, 35], degrees=True).as_matrix() @ np.diag(flip)
    if np.linalg.det(direction) < 0:
        direction = direction[:, [1, 0, 2]]
    return Geometry(shape, np.array(spacing), np.array([120.0, -300.0, 55.0]), direction)


@pytest.mark.parametrize("stride", [(4, 16, 16), (16, 16, 16)])
def test_network_geometry_covers_an_oblique_scan(stride):
    geometry = oblique()
    grid = network_geometry(geometry, stride)
    assert np.allclose(grid.direction, np.eye(3)) and np.allclose(grid.spacing, 2.0)
    assert all(n % s == 0 for n, s in zip(grid.shape, stride))
    assert grid.contains(geometry.corners_mm(), margin_voxels=0.5 + 1e-6).all()
    low = geometry.corners_mm().min(0)
    assert np.allclose(grid.origin - 1.0, low)


def test_network_geometry_of_a_canonical_2_mm_scan_is_its_own_grid():
    geometry = Geometry((32, 48, 64), np.full(3, 2.0), np.array([3.0, 4.0, 5.0]), np.eye(3))
    assert network_geometry(geometry, (16, 16, 16)).same_as(geometry)


def test_network_geometry_refuses_an_absurd_box():
    geometry = Geometry((100, 4000, 4000), np.array([5.0, 5.0, 5.0]), np.zeros(3), np.eye(3))
    with pytest.raises(InputError, match="too large"):
        network_geometry(geometry, (16, 16, 16))


def test_prepared_values_keep_their_millimetres_for_an_oblique_flipped_scan():
    geometry = oblique((24, 60, 50), (2.0, 1.5, 5.0))
    places = geometry.grid_points_mm()
    ramp = (places @ np.array([0.7, -0.4, 0.5]) * 0.8).reshape(geometry.shape).astype(np.float32)
    prepared = prepare(Volume(ramp, geometry, "ct"), InputMap(), (16, 16, 16))
    inner = prepared.valid
    points = prepared.geometry.grid_points_mm()[inner.reshape(-1)]
    index = geometry.mm_to_index(points)
    deep = ((index > 1.5) & (index < np.array(geometry.shape[::-1]) - 2.5)).all(1)
    expected = points[deep] @ np.array([0.7, -0.4, 0.5]) * 0.8
    seen = prepared.volume.array[inner][deep]
    assert deep.sum() > 1000
    assert np.abs(expected - seen).max() < 0.1
    assert np.all(prepared.image[~prepared.valid] == InputMap().pad)
    assert not prepared.body[~prepared.valid].any()


def test_finer_scans_are_smoothed_before_sampling():
    shape = (40, 80, 80)
    checker = np.indices(shape).sum(0) % 2 * 400.0
    volume = Volume(checker.astype(np.float32), Geometry(shape, np.full(3, 0.7), np.zeros(3), np.eye(3)), "ct")
    prepared = prepare(volume, InputMap(), (2, 2, 2))
    assert prepared.volume.array[prepared.valid][200:-200].std() < 40


def test_input_maps():
    hu = np.array([-1024.0, -300, 0, 100, 2000, 5000])
    ours = InputMap()
    assert np.allclose(ours.unit(hu, "ct"), [0, 0.22, 0.5, 0.66, 1, 1])
    assert ours.scale(np.zeros(1))[0] == ours.pad == -2.0
    released = InputMap("released")
    assert np.allclose(released(np.array([-1024.0, 3071.0, -221.0]), "ct"), [-50, 205, 0.0], atol=0.05)
    mr = np.linspace(0, 0.05, 1001)
    assert np.allclose(released(mr, "mr")[[0, 500, 1000]], [-50, 77.5, 205], atol=0.2)
    with pytest.raises(InputError, match="newer version"):
        InputMap("else")


def test_modality_follows_evidence_and_doubt_names_the_option():
    image = torso_ct()
    ct = Volume.from_sitk(image)
    assert decide_modality(ct)[0] == "ct"
    rng = np.random.default_rng(0)
    mr = ct.replace(np.abs(rng.normal(300, 120, ct.array.shape)).astype(np.float32))
    assert decide_modality(mr)[0] == "mr"
    assert decide_modality(mr, "ct") == ("ct", "given by the user")
    unsigned = ct.replace(ct.array + 1024)
    with pytest.raises(ModalityError, match="--moving-modality"):
        decide_modality(unsigned, option="--moving-modality")
    with pytest.raises(InputError, match="unknown modality"):
        decide_modality(ct, "pet")


def test_body_mask_leaves_the_table_and_keeps_the_lungs():
    volume = Volume.from_sitk(torso_ct((36, 60, 48)))
    volume.modality = "ct"
    volume.array[:, 57:59, 8:40] = 200
    mask = body_mask(volume)
    assert not mask[:, 56:, :].any()
    lungs = (volume.array < -700) & (volume.array > -870)
    assert mask[lungs].mean() > 0.97
    air = volume.array < -950
    assert mask[air].mean() < 0.05


def test_body_mask_is_the_same_in_any_axis_order():
    volume = Volume.from_sitk(torso_ct((36, 60, 48)))
    volume.modality = "ct"
    direction = np.array([[0, 0, 1.0], [1, 0, 0], [0, 1, 0]])
    geometry = Geometry((48, 36, 60), volume.geometry.spacing[[1, 2, 0]], volume.geometry.origin, direction)
    turned = Volume(np.transpose(volume.array, (2, 0, 1)).copy(), geometry, "ct")
    axis_of_x, axis_of_y, axis_of_z = (int(np.argmax(np.abs(direction[row]))) for row in range(3))
    assert (axis_of_x, axis_of_y, axis_of_z) == (2, 0, 1)
    first, second = body_mask(volume), body_mask(turned)
    assert (np.transpose(first, (2, 0, 1)) == second).mean() > 0.97


def test_prepare_needs_a_modality():
    with pytest.raises(ModalityError):
        prepare(Volume.from_sitk(torso_ct()), InputMap(), (16, 16, 16))


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        ("ct_mij_abdpelvis/ct.nii.gz", "ct"),
        ("ct_ts_heartcta/ct_aorta.nii.gz", "ct"),
        ("mr_lihc4073_abdcor/mr.nii.gz", "mr"),
        ("mr_prostatex0000_pelvis/t2_tra.nii.gz", "mr"),
        ("head_mni_ctmr/mr_mni152_t1_2mm_head.nii.gz", "mr"),
    ],
)
def test_modality_of_real_scans(real_data, name, modality):
    assert decide_modality(Volume.read(real_data(name)[0]))[0] == modality
