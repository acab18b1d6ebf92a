"""Bad input at the command line: each ends with its exit code and one clear line, without traceback or leftovers."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from small_scans import torso_ct

from uae.cli import main

HEADER = "label,x_lps_mm,y_lps_mm,z_lps_mm\n"
INSIDE = HEADER + "spine,4,36,60\n"


def run(argv: list[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and the one line on stderr of a command."""
    code = main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    return code, captured.err


def write(path: Path, array: np.ndarray, vector: bool = False) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=vector), str(path))


def two_dimensional(folder: Path) -> Path:
    write(folder / "slice.nrrd", np.random.default_rng(0).normal(0, 300, (40, 40)).astype(np.float32))
    return folder / "slice.nrrd"


def series(folder: Path) -> Path:
    frames = [torso_ct(), torso_ct(seed=1)]
    sitk.WriteImage(sitk.JoinSeries(frames), str(folder / "cine.nii.gz"))
    return folder / "cine.nii.gz"


def colour(folder: Path) -> Path:
    array = np.random.default_rng(0).integers(0, 255, (12, 20, 20, 3)).astype(np.uint8)
    write(folder / "rgb.nrrd", array, vector=True)
    return folder / "rgb.nrrd"


def not_a_number(folder: Path, value: float = np.nan) -> Path:
    array = sitk.GetArrayFromImage(torso_ct())
    array[3, 4, 5] = value
    write(folder / "nan.nrrd", array)
    return folder / "nan.nrrd"


def infinite(folder: Path) -> Path:
    return not_a_number(folder, np.inf)


def one_slice(folder: Path) -> Path:
    sitk.WriteImage(torso_ct()[:, :, 10:11], str(folder / "one.nii.gz"))
    return folder / "one.nii.gz"


def constant(folder: Path) -> Path:
    write(folder / "constant.nrrd", np.full((20, 20, 20), 40.0, np.float32))
    return folder / "constant.nrrd"


def spacing_zero(folder: Path) -> Path:
    # ITK refuses to write this, so the header is changed by hand: pixdim[3] of NIfTI-1 lies at byte 88
    sitk.WriteImage(torso_ct(), str(folder / "good.nii"))
    data = bytearray((folder / "good.nii").read_bytes())
    data[88:92] = np.float32(0).tobytes()
    (folder / "good.nii").unlink()
    (folder / "zero.nii").write_bytes(data)
    return folder / "zero.nii"


def spacing_one_kilometre(folder: Path) -> Path:
    image = torso_ct()
    image.SetSpacing((1.0, 1.0, 1e6))
    sitk.WriteImage(image, str(folder / "km.nrrd"))
    return folder / "km.nrrd"


def mask(folder: Path) -> Path:
    write(folder / "mask.nrrd", (sitk.GetArrayFromImage(torso_ct()) > 0).astype(np.uint8))
    return folder / "mask.nrrd"


def truncated(folder: Path) -> Path:
    sitk.WriteImage(torso_ct(), str(folder / "whole.nii.gz"))
    data = (folder / "whole.nii.gz").read_bytes()
    (folder / "whole.nii.gz").unlink()
    (folder / "cut.nii.gz").write_bytes(data[: len(data) // 2])
    return folder / "cut.nii.gz"


def truncated_inside(folder: Path) -> Path:
    """The archive is sound, the image in it ends early: ITK alone fills such a file with zeros."""
    sitk.WriteImage(torso_ct(), str(folder / "whole.nii"))
    data = (folder / "whole.nii").read_bytes()
    (folder / "whole.nii").unlink()
    (folder / "short.nii.gz").write_bytes(gzip.compress(data[: len(data) // 2]))
    return folder / "short.nii.gz"


def no_image(folder: Path) -> Path:
    (folder / "letter.nii.gz").write_text("Dear radiologist,")
    return folder / "letter.nii.gz"


def empty_folder(folder: Path) -> Path:
    (folder / "dicom").mkdir()
    return folder / "dicom"


def missing(folder: Path) -> Path:
    return folder / "missing.nii.gz"


def doubtful(folder: Path) -> Path:
    """A CT stored without its rescale intercept: air at 24, water at 1024, no Hounsfield units and no MR either."""
    sitk.WriteImage(torso_ct() + 1024.0, str(folder / "doubt.nii.gz"))
    return folder / "doubt.nii.gz"


SCANS: list[tuple[Callable[[Path], Path], tuple[str, ...]]] = [
    (two_dimensional, ("2-D",)),
    (series, ("4-D", "volumes", "series", "time")),
    (colour, ("3 values", "colour", "RGB")),
    (not_a_number, ("NaN",)),
    (infinite, ("infinite",)),
    (one_slice, ("slice",)),
    (constant, ("40", "constant", "all voxels")),
    (spacing_zero, ("spacing",)),
    (spacing_one_kilometre, ("spacing",)),
    (mask, ("mask", "label")),
    (truncated, ("truncated",)),
    (truncated_inside, ("truncated", "early", "short")),
    (no_image, ("letter.nii.gz",)),
    (empty_folder, ("dicom",)),
    (missing, ("no such file",)),
]


@pytest.mark.parametrize(("make", "words"), SCANS, ids=[make.__name__ for make, _ in SCANS])
def test_a_scan_that_cannot_be_used(make, words, tmp_path, small_ct, tiny_model, capsys):
    scan, result = make(tmp_path), tmp_path / "result"
    for pair in ((scan, small_ct), (small_ct, scan)):
        code, line = run(["register", *pair, "--output", result, "--model", tiny_model], capsys)
        assert code == 2
        assert scan.name in line and any(word in line for word in words), line
    assert not result.exists()


def test_doubtful_modality_names_the_option_that_decides_it(tmp_path, small_ct, tiny_model, capsys):
    scan = doubtful(tmp_path)
    code, line = run(["register", small_ct, scan, "--output", tmp_path / "r", "--model", tiny_model], capsys)
    assert code == 2 and "--moving-modality" in line
    (tmp_path / "p.csv").write_text(INSIDE)
    argv = ["match", small_ct, scan, "--points", tmp_path / "p.csv", "--output", tmp_path / "o.csv"]
    code, line = run([*argv, "--model", tiny_model], capsys)
    assert code == 2 and "--query-modality" in line
    code, line = run(["embed", scan, "--output", tmp_path / "o.uae", "--model", tiny_model], capsys)
    assert code == 2 and "--modality" in line


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("outside.csv", HEADER + "in,4,36,60\nfar,900,0,0\n", "far"),
        ("empty.csv", HEADER, "point"),
        ("headless.csv", "spine,4,36,60\n", "label,x_lps_mm,y_lps_mm,z_lps_mm"),
        ("text.csv", HEADER + "spine,four,36,60\n", "text.csv"),
        ("nan.csv", HEADER + "spine,nan,36,60\n", "spine"),
        ("empty.mrk.json", json.dumps({"markups": [{"coordinateSystem": "LPS", "controlPoints": []}]}), "point"),
        ("damaged.mrk.json", '{"markups": [', "damaged.mrk.json"),
        ("points.txt", "1 2 3\n", ".mrk.json"),
    ],
)
def test_points_that_cannot_be_used(name, text, word, tmp_path, small_ct, tiny_model, capsys):
    (tmp_path / name).write_text(text)
    argv = ["match", small_ct, small_ct, "--points", tmp_path / name, "--output", tmp_path / "found.csv"]
    code, line = run([*argv, "--model", tiny_model], capsys)
    assert code == 2 and word in line, line
    assert not (tmp_path / "found.csv").exists()


def test_missing_points(tmp_path, small_ct, tiny_model, capsys):
    argv = ["match", small_ct, small_ct, "--points", tmp_path / "no.csv", "--output", tmp_path / "o.csv"]
    code, line = run([*argv, "--model", tiny_model], capsys)
    assert code == 2 and "no.csv" in line


def test_an_output_below_a_file(tmp_path, small_ct, tiny_model, capsys):
    (tmp_path / "file").write_text("")
    for argv in (
        ["register", small_ct, small_ct, "--output", tmp_path / "file"],
        ["register", small_ct, small_ct, "--output", tmp_path / "file" / "below"],
        ["embed", small_ct, "--output", tmp_path / "file" / "o.uae"],
    ):
        code, line = run([*argv, "--model", tiny_model], capsys)
        assert code == 2 and str(tmp_path / "file") in line


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
@pytest.mark.parametrize("mode", [0o500, 0o555])
def test_a_read_only_output_folder(mode, tmp_path, small_ct, tiny_model, capsys):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(mode)
    if os.geteuid() == 0:
        # permissions do not bind the superuser: the same command as somebody else, in a process of its own
        code, line = _as_nobody(["embed", small_ct, "--output", folder / "o.uae", "--model", tiny_model], tmp_path)
    else:
        code, line = run(["embed", small_ct, "--output", folder / "o.uae", "--model", tiny_model], capsys)
    assert code == 2 and "permission" in line and "--output" in line
    assert list(folder.iterdir()) == []


def _as_nobody(argv: list[object], tmp_path: Path) -> tuple[int, str]:
    """Run a command as user 65534; only what is imported before the change of user has to be readable for it."""
    script = (
        "import os, sys\n"
        "from uae.cli import main\n"
        "from uae.cli.parser import build_parser\n"
        "build_parser()\n"
        "import tempfile; tempfile.gettempdir()\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder.name.startswith(("pytest-", tmp_path.name)):
            folder.chmod(folder.stat().st_mode | 0o011)
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, argv)], capture_output=True, text=True, timeout=120, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


@pytest.fixture
def full_disk(tmp_path: Path):
    """A disk of 64 kB where the system lets us make one, else None."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    mounted = (
        mount is not None
        and sys.platform == "linux"
        and subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, check=False
        ).returncode
        == 0
    )
    yield disk if mounted else None
    if mounted:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_exit_4_and_leaves_nothing(full_disk, tmp_path, small_ct, tiny_model, capsys, monkeypatch):
    if full_disk is None:  # without the right to mount: the operating system's answer at the last step
        full_disk = tmp_path / "disk"

        def no_space(*_names):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("uae.files.os.replace", no_space)
    code, line = run(["embed", small_ct, "--output", full_disk / "ct.uae", "--model", tiny_model], capsys)
    assert code == 4 and "disk is full" in line
    sitk.WriteTransform(sitk.TranslationTransform(3, (1.0, 2.0, 3.0)), str(tmp_path / "t.tfm"))
    argv = ["apply", tmp_path / "t.tfm", small_ct, "--reference", small_ct, "--output", full_disk / "o.nii.gz"]
    code, line = run(argv, capsys)
    assert code == 4 and "disk is full" in line
    assert list(full_disk.iterdir()) == []


def test_a_model_file_with_a_wrong_hash(tmp_path, small_ct, tiny_model, capsys):
    from uae.models import register_model

    copy = tmp_path / "tiny.pt"
    shutil.copy(tiny_model, copy)
    register_model(copy)
    data = bytearray(copy.read_bytes())
    data[len(data) // 2] ^= 1
    copy.write_bytes(data)
    code, line = run(["embed", small_ct, "--output", tmp_path / "o.uae", "--model", copy], capsys)
    assert code == 2 and "tiny.pt" in line and ("SHA-256" in line or "hash" in line)


class Payload:
    """What a malicious file would hold: unpickling it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("plain_pickle", [False, True])
def test_pickled_code_in_a_model_file_is_refused_and_not_run(plain_pickle, tmp_path, small_ct, capsys):
    import torch

    proof, model = tmp_path / "executed", tmp_path / "evil.pt"
    content = {"state_dict": {}, "meta": Payload(proof)}
    if plain_pickle:
        model.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, model)
    for argv in (
        ["embed", small_ct, "--output", tmp_path / "o.uae", "--model", model],
        ["models", "import", model, "--output", tmp_path / "models"],
    ):
        code, line = run(argv, capsys)
        assert code == 2 and "evil.pt" in line
    assert not proof.exists()


@pytest.mark.parametrize("content", [b"", b"no model", b"PK\x03\x04 broken archive"])
def test_a_file_that_is_no_model(content, tmp_path, small_ct, capsys):
    (tmp_path / "m.pt").write_bytes(content)
    code, line = run(["embed", small_ct, "--output", tmp_path / "o.uae", "--model", tmp_path / "m.pt"], capsys)
    assert code == 2 and "m.pt" in line


def test_an_unknown_model_and_an_unknown_device(tmp_path, small_ct, tiny_model, capsys):
    code, line = run(["embed", small_ct, "--output", tmp_path / "o.uae", "--model", "uae-x"], capsys)
    assert code == 2 and "uae-x" in line
    argv = ["embed", small_ct, "--output", tmp_path / "o.uae", "--model", tiny_model]
    for device in ("tpu", "cuda:99"):
        code, line = run([*argv, "--device", device], capsys)
        assert code == 2 and device in line


def test_apply_without_a_result_or_without_a_grid(tmp_path, small_ct, capsys):
    (tmp_path / "refused").mkdir()
    (tmp_path / "p.csv").write_text(INSIDE)
    code, line = run(["apply", tmp_path / "refused", tmp_path / "p.csv", "--output", tmp_path / "o.csv"], capsys)
    assert code == 2 and "refused" in line
    sitk.WriteTransform(sitk.TranslationTransform(3, (1.0, 2.0, 3.0)), str(tmp_path / "t.tfm"))
    code, line = run(["apply", tmp_path / "t.tfm", small_ct, "--output", tmp_path / "o.nii.gz"], capsys)
    assert code == 2 and "--reference" in line
