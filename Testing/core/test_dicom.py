"""DICOM folders: geometry from the slices' positions, and what must be refused."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from uae.errors import InputError
from uae.transform import Rigid
from uae.volume import Geometry, Volume

SERIES = "1.2.826.0.1.3680043.8.498.1"
OBLIQUE = Geometry((8, 10, 12), (0.7, 0.9, 2.5), (-35.5, 22.25, 410.125), Rigid.from_euler_deg(6, -10, 20).rotation)


def write_series(
    folder, geometry=OBLIQUE, uid=SERIES, skip=(), modality="CT", description="body", drift=0.0, shift=(), seed=0
):
    """One file a slice, in shuffled file order; returns the stored values (z, y, x).

    drift moves each slice by that many mm along the rows (a tilted gantry); shift is {slice: mm along the normal}.
    """
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    values = rng.integers(-1024, 2000, geometry.shape).astype(np.int16)
    names = rng.permutation(geometry.shape[0])
    direction = geometry.direction
    for k in range(geometry.shape[0]):
        if k in skip:
            continue
        along = k * geometry.spacing[2] + dict(shift).get(k, 0.0)
        position = geometry.origin + along * direction[:, 2] + k * drift * direction[:, 1]
        image = sitk.GetImageFromArray(values[k : k + 1])
        image.SetSpacing([float(geometry.spacing[0]), float(geometry.spacing[1]), 1.0])
        tags = {
            "0008|0060": modality,
            "0008|103e": description,
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{uid}.{k + 1}",
            "0020|000d": "1.2.826.0.1.3680043.8.498.99",
            "0020|000e": uid,
            "0020|0052": "1.2.826.0.1.3680043.8.498.77",
            "0020|0013": str(k + 1),
            "0020|0032": "\\".join(f"{v:.6f}" for v in position),
            "0020|0037": "\\".join(f"{v:.8f}" for v in direction[:, :2].T.ravel()),
            "0028|1052": "0",
            "0028|1053": "1",
        }
        for key, value in tags.items():
            image.SetMetaData(key, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{uid[-3:]}_{names[k]:03d}.dcm"))
        writer.Execute(image)
    return values


def test_series_geometry_values_and_tags(tmp_path):
    values = write_series(tmp_path / "s")
    volume = Volume.read(tmp_path / "s")
    assert volume.geometry.same_as(OBLIQUE, 1e-3)
    np.testing.assert_array_equal(volume.array, values)
    assert volume.modality == "ct"
    assert "Modality" in volume.modality_reason
    assert volume.meta["SeriesInstanceUID"] == SERIES
    assert volume.meta["FrameOfReferenceUID"].endswith(".77")
    one_file = next((tmp_path / "s").iterdir())
    np.testing.assert_array_equal(Volume.read(one_file).array, values)


def test_modality_comes_from_the_tag(tmp_path):
    write_series(tmp_path / "s", modality="MR")
    assert Volume.read(tmp_path / "s").modality == "mr"
    write_series(tmp_path / "pt", modality="PT")
    volume = Volume.read(tmp_path / "pt")
    assert volume.modality is None
    assert volume.meta["Modality"] == "PT"


def test_several_series_are_listed_and_chosen(tmp_path):
    first = write_series(tmp_path / "s", description="arterial")
    other = SERIES[:-1] + "2"
    second = write_series(tmp_path / "s", uid=other, description="venous", seed=1)
    with pytest.raises(InputError, match="--series UID") as caught:
        Volume.read(tmp_path / "s")
    for word in (SERIES, other, "arterial", "venous", "8 files"):
        assert word in str(caught.value)
    np.testing.assert_array_equal(Volume.read(tmp_path / "s", series=SERIES).array, first)
    np.testing.assert_array_equal(Volume.read(tmp_path / "s", series=other).array, second)
    with pytest.raises(InputError, match=r"no series 1\.2\.3; choose"):
        Volume.read(tmp_path / "s", series="1.2.3")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"skip": (3,)}, "slice is missing after slice 3 of 7"),
        ({"shift": ((4, 0.1),)}, "not constant"),
        ({"shift": ((4, -2.5),)}, "several slices at one position"),
        ({"drift": 0.3}, "gantry tilt"),
        ({"skip": tuple(range(1, 8))}, "one slice"),
        ({"skip": tuple(range(3, 8))}, "too small"),
    ],
)
def test_irregular_series_are_refused(tmp_path, change, word):
    write_series(tmp_path / "s", **change)
    with pytest.raises(InputError, match=word) as caught:
        Volume.read(tmp_path / "s")
    assert str(tmp_path / "s") in str(caught.value)


def test_tilt_is_named_with_its_angle(tmp_path):
    write_series(tmp_path / "s", drift=2.5 * np.tan(np.radians(15)))
    with pytest.raises(InputError, match=r"gantry tilt \(15\.0 degrees\)"):
        Volume.read(tmp_path / "s")


def test_steps_within_one_percent_are_constant(tmp_path):
    write_series(tmp_path / "s", shift=((4, 0.01),))
    assert Volume.read(tmp_path / "s").geometry.same_as(OBLIQUE, 1e-3)


def test_truncated_slice_is_refused(tmp_path):
    write_series(tmp_path / "s")
    path = sorted((tmp_path / "s").iterdir())[2]
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(InputError, match=r"truncated|damaged"):
        Volume.read(tmp_path / "s")


def test_localizer_in_the_series_is_refused(tmp_path):
    write_series(tmp_path / "s")
    turned = Geometry(OBLIQUE.shape, OBLIQUE.spacing, OBLIQUE.origin, np.eye(3))
    write_series(tmp_path / "t", geometry=turned, skip=range(1, 8))
    (single,) = (tmp_path / "t").iterdir()
    single.rename(tmp_path / "s" / "zz.dcm")
    with pytest.raises(InputError, match="orientation"):
        Volume.read(tmp_path / "s")


def test_files_without_positions_are_refused(tmp_path):
    (tmp_path / "s").mkdir()
    for k in range(5):
        image = sitk.Image([8, 8, 1], sitk.sitkInt16)
        image.SetMetaData("0008|0060", "OT")
        image.SetMetaData("0020|000e", SERIES)
        sitk.WriteImage(image, str(tmp_path / "s" / f"{k}.dcm"))
    with pytest.raises(InputError):
        Volume.read(tmp_path / "s")
