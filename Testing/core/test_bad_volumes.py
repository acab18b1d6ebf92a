"""Images that cannot be used: each is refused by one line that names the cause."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import SimpleITK as sitk

from uae.errors import InputError, ResourceError
from uae.volume import Geometry, Volume


def scan(shape=(10, 12, 14), seed=0):
    return sitk.GetImageFromArray(np.random.default_rng(seed).normal(0, 300, shape).astype(np.float32))


def refused(path, match, **options):
    with pytest.raises(InputError, match=match) as caught:
        Volume.read(path, **options)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert ";" in message, "the next step is missing"
    return message


def write(path, image, compress=False):
    sitk.WriteImage(image, str(path), useCompression=compress)
    return path


def test_missing_empty_and_foreign_files_are_refused(tmp_path):
    refused(tmp_path / "none.nii.gz", "no such file")
    (tmp_path / "empty.nii").touch()
    refused(tmp_path / "empty.nii", "empty")
    for name in ("text.nii", "text.nrrd", "text.dcm", "text"):
        (tmp_path / name).write_text("this is not an image" * 100)
        refused(tmp_path / name, "not an image format|damaged")
    (tmp_path / "text.nii.gz").write_text("this is not an image")
    refused(tmp_path / "text.nii.gz", r"not a readable \.gz")
    refused(tmp_path, "no DICOM series")


@pytest.mark.parametrize("cut", [40, 3000])
@pytest.mark.parametrize(
    ("name", "compress"),
    [("a.nii", False), ("a.nii.gz", True), ("a.nrrd", False), ("a.nrrd", True), ("a.mha", False), ("a.mha", True)],
)
def test_truncated_files_are_refused(tmp_path, name, compress, cut):
    path = write(tmp_path / name, scan(), compress)
    Volume.read(path)
    path.write_bytes(path.read_bytes()[:-cut])
    refused(path, "truncated")


def test_truncated_inside_a_whole_gzip_is_refused(tmp_path):
    """What a full disk leaves behind: a valid .gz around too few voxels; ITK alone fills the rest with zeros."""
    whole = write(tmp_path / "a.nii", scan()).read_bytes()
    path = tmp_path / "b.nii.gz"
    path.write_bytes(gzip.compress(whole[: len(whole) // 2]))
    refused(path, "truncated")


def test_truncated_raw_file_beside_its_header_is_refused(tmp_path):
    write(tmp_path / "a.mhd", scan())
    raw = tmp_path / "a.raw"
    raw.write_bytes(raw.read_bytes()[:-100])
    refused(tmp_path / "a.mhd", "truncated")


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd"])
def test_dimensions_other_than_three_are_refused(tmp_path, suffix):
    image = scan()
    refused(write(tmp_path / f"slice{suffix}", image[:, :, 3]), "2-D image")
    message = refused(write(tmp_path / f"series{suffix}", sitk.JoinSeries([image, image])), "4-D series of 2 volumes")
    assert "extract" in message
    refused(write(tmp_path / f"one{suffix}", image[:, :, 3:4]), "one slice")
    refused(write(tmp_path / f"thin{suffix}", image[:, 2:5, :]), "too small")


def test_series_of_one_volume_is_that_volume(tmp_path):
    image = scan()
    volume = Volume.read(write(tmp_path / "series.nrrd", sitk.JoinSeries([image])))
    np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(image))


def test_colour_vector_and_complex_images_are_refused(tmp_path):
    image = scan()
    refused(write(tmp_path / "v.nii.gz", sitk.Compose(image, image, image)), "3 values in each voxel")
    refused(write(tmp_path / "c.nrrd", sitk.Cast(sitk.Compose(image, image, image), sitk.sitkVectorUInt8)), "colour")
    refused(write(tmp_path / "two.mha", sitk.Compose(image, image)), "2 values")


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_voxels_that_are_no_numbers_are_counted(tmp_path, suffix):
    array = sitk.GetArrayFromImage(scan())
    array[2, 3, 4:6] = np.nan
    array[5, 5, 5] = -np.inf
    path = write(tmp_path / f"nan{suffix}", sitk.GetImageFromArray(array))
    refused(path, "3 voxels are NaN or infinite")
    refused(path, "3 voxels are NaN or infinite", label=True)


def test_constant_images_are_refused_but_not_constant_labels(tmp_path):
    path = write(tmp_path / "c.nii.gz", scan() * 0 + 5)
    refused(path, "value 5")
    assert Volume.read(path, label=True).array.max() == 5


def test_masks_and_label_maps_instead_of_images_are_refused(tmp_path):
    mask = scan() > 0
    refused(write(tmp_path / "mask.nii.gz", mask), "mask or label map")
    refused(write(tmp_path / "float.nii.gz", sitk.Cast(mask, sitk.sitkFloat32)), "mask or label map")
    blocks = np.arange(64).reshape(4, 4, 4).repeat(6, 0).repeat(6, 1).repeat(6, 2).astype(np.int16)
    refused(write(tmp_path / "organs.nii.gz", sitk.GetImageFromArray(blocks)), "mask or label map")
    refused(write(tmp_path / "image.nii.gz", scan()), "fractional", label=True)


def test_eight_bit_scans_are_not_taken_for_labels(tmp_path):
    array = np.random.default_rng(0).normal(100, 25, (12, 20, 20)).clip(0, 255).astype(np.uint8)
    array[:, :6] = 0
    assert Volume.read(write(tmp_path / "mr.nii.gz", sitk.GetImageFromArray(array))).array.dtype == np.float32


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("value", [0.0, -2.0, float("nan"), 500.0, 1e-5])
def test_geometry_with_bad_spacing_in_nifti_is_refused(tmp_path, axis, value):
    path = write(tmp_path / "a.nii", scan())
    data = bytearray(path.read_bytes())
    struct.pack_into("<f", data, 76 + 4 * axis, value)
    path.write_bytes(data)
    refused(path, "spacing")


@pytest.mark.parametrize("value", ["0", "-1", "200", "1e-5", "nan"])
def test_geometry_with_bad_spacing_in_metaimage_is_refused(tmp_path, value):
    path = write(tmp_path / "a.mha", scan())
    path.write_bytes(path.read_bytes().replace(b"ElementSpacing = 1 1 1", f"ElementSpacing = 1 {value} 1".encode()))
    refused(path, "spacing")


def test_geometry_with_zero_axis_in_nrrd_is_refused(tmp_path):
    path = write(tmp_path / "a.nrrd", scan())
    path.write_bytes(path.read_bytes().replace(b"(0,1,0)", b"(0,0,0)"))
    refused(path, "spacing|perpendicular")


def test_geometry_beyond_any_scanner_is_refused(tmp_path):
    image = scan((4, 4, 60))
    image.SetSpacing((90.0, 1.0, 1.0))
    refused(write(tmp_path / "a.nrrd", image), "5 m")


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_geometry_with_shear_is_refused_with_a_word_on_tilt(tmp_path, suffix):
    image = scan()
    image.SetDirection((1, 0, 0, 0, 1, np.sin(0.1), 0, 0, np.cos(0.1)))
    refused(write(tmp_path / f"a{suffix}", image), "gantry tilt")


def test_geometry_with_shear_in_nifti_is_refused_with_a_word_on_tilt(tmp_path):
    path = write(tmp_path / "a.nii", scan())
    data = bytearray(path.read_bytes())
    struct.pack_into("<h", data, 252, 0)
    struct.pack_into("<f", data, 288, 0.3)
    path.write_bytes(data)
    refused(path, "gantry tilt")


def test_padding_below_air_stays_in_the_array(tmp_path):
    array = sitk.GetArrayFromImage(scan())
    array[0] = -3024
    assert Volume.read(write(tmp_path / "ge.nii.gz", sitk.GetImageFromArray(array))).minimum == -3024


def test_writing_refuses_unknown_endings_and_leaves_nothing(tmp_path):
    volume = Volume.from_sitk(scan())
    with pytest.raises(InputError, match=r"\.nii\.gz"):
        volume.write(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch, suffix):
    """ITK writes a short NIfTI without a word; the probe behind it must notice."""

    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("uae.itk_files._probe_space", full)
    with pytest.raises(ResourceError, match="disk is full"):
        Volume.from_sitk(scan()).write(tmp_path / f"a{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_array_and_geometry_must_agree():
    with pytest.raises(ValueError, match="shape"):
        Volume(np.zeros((4, 4, 5)), Geometry((4, 4, 4), (1, 1, 1), (0, 0, 0), np.eye(3)))
