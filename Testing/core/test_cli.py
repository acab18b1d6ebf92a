"""The command line: help, exit codes, messages, progress, and what it must not import."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_scans import torso_ct

from uae.cli import main
from uae.cli import run as cli_run
from uae.cli.common import Session, check_writable, whole_folder
from uae.cli.match import read_cohort
from uae.errors import CancelledError, InputError, ModelError, NoConfidentResultError, ResourceError

COMMANDS = ("register", "deform", "match", "apply", "embed", "train", "bench", "models", "phantom", "info", "worker")
HEADER = "label,x_lps_mm,y_lps_mm,z_lps_mm\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_an_example_and_the_exit_codes(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    example = text.partition("example:")[2]
    assert f"uae {command}" in example
    assert "--progress" in text and "--threads" in text and "--verbose" in text
    assert "130  cancelled" in text


def test_the_program_lists_all_its_commands(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {command}" in listed or f"    {command}" in listed for command in COMMANDS)


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ([], "COMMAND"),
        (["regster"], "regster"),
        (["register", "a.nii.gz"], "MOVING"),
        (["register", "a.nii.gz", "b.nii.gz", "--output", "o", "--threads", "0"], "--threads"),
        (["match", "a.nii.gz", "--points", "p.csv", "--output", "o.csv"], "--query-list"),
        (["match", "a.nii.gz", "b.nii.gz", "--query-list", "c.csv", "--points", "p.csv", "--output", "o"], "both"),
        (["match", "a.nii.gz", "b.nii.gz", "--points", "p.csv", "--output", "o.txt"], ".mrk.json"),
        (["match", "a.nii.gz", "b.nii.gz", "--points", "p.csv", "--output", "o.csv", "--side", "4"], "--side"),
        (["models", "import"], "FILE"),
        (["models", "list", "file.pt"], "FILE"),
        (["apply", "only_one.nii.gz", "--output", "o.nii.gz"], "DIR|TRANSFORM"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line_and_exit_2(argv, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert word in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_info_json_imports_no_torch_and_says_the_versions():
    code = (
        "import json, sys, io, contextlib\n"
        "from uae.cli import main\n"
        "out = io.StringIO()\n"
        "with contextlib.redirect_stdout(out):\n"
        "    code = main(['info', '--json'])\n"
        "facts = json.loads(out.getvalue())\n"
        "print(json.dumps([code, 'torch' in sys.modules, 'devices' in facts, facts]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    exit_code, torch_imported, has_devices, facts = json.loads(done.stdout)
    assert exit_code == 0 and not torch_imported and not has_devices
    assert facts["libraries"]["numpy"] == np.__version__
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))


def test_info_names_the_devices_when_asked(capsys):
    assert main(["info", "--json", "--devices"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"][0].startswith("cpu")


def test_python_dash_m_is_the_same_program():
    done = subprocess.run(
        [sys.executable, "-m", "uae", "register"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


class OutOfMemoryError(RuntimeError):
    """Stands for torch.OutOfMemoryError, which is found by its name so that torch need not be imported."""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("bad"), 2),
        (ModelError("bad model"), 2),
        (NoConfidentResultError("refused"), 3),
        (ResourceError("full"), 4),
        (MemoryError(), 4),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), 4),
        (RuntimeError("Failed to allocate memory for image."), 4),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), 4),
        (OSError(errno.ENOSPC, "No space left on device"), 4),
        (CancelledError("cancelled"), 130),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("a\ndefect"), 1),
    ],
)
def test_every_kind_of_error_has_its_exit_code_and_one_line(error, code, capsys, monkeypatch):
    def fail(*_arguments, **_named):
        raise error

    monkeypatch.setattr("uae.info.collect", fail)
    assert main(["info"]) == code
    written = capsys.readouterr().err
    assert written.startswith("error: ") and written.count("\n") == 1 and "Traceback" not in written


def test_verbose_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setattr("uae.info.collect", lambda devices: 1 / 0)
    assert main(["info", "-v"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_progress_json_puts_only_json_lines_on_stdout(capsys):
    session = Session("json")
    for fraction in (0.0, 0.5, 1.0):
        session.progress("embed", fraction)
        time.sleep(0.25)
    session.say("a table for people")
    session.finish(0, "done")
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [line["percent"] for line in lines] == [0.0, 50.0, 100.0, 100.0]
    assert all({"stage", "percent", "eta_s"} <= set(line) for line in lines)
    assert lines[0]["eta_s"] is None and lines[1]["eta_s"] == pytest.approx(0.25, abs=0.2)
    assert lines[-1]["stage"] == "finished" and lines[-1]["exit_code"] == 0
    assert captured.err == "a table for people\n"


def test_progress_json_ends_with_the_exit_code_of_an_error(capsys, tmp_path):
    argv = ["embed", str(tmp_path / "none.nii.gz"), "--output", str(tmp_path / "o.uae"), "--progress", "json"]
    assert main(argv) == 2
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["stage"] == "finished" and last["exit_code"] == 2 and "none.nii.gz" in last["message"]


def test_a_bar_is_drawn_only_on_a_terminal(capsys):
    Session("auto").progress("embed", 0.5)
    assert capsys.readouterr() == ("", "")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    result = tmp_path / "result"
    with whole_folder(result) as folder:
        (folder / "report.json").write_text("first")
        (folder / "rigid.tfm").write_text("first")
    with pytest.raises(ZeroDivisionError), whole_folder(result) as folder:
        (folder / "report.json").write_text("half")
        raise ZeroDivisionError
    assert (result / "report.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_an_output_that_cannot_be_written_is_known_before_the_work(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for output, folder in ((file / "below", True), (file / "below.csv", False), (file, True), (tmp_path, False)):
        with pytest.raises(InputError, match=r"."):
            check_writable(output, folder=folder)
    assert check_writable(tmp_path / "new" / "place.csv") == tmp_path / "new" / "place.csv"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize(
    ("options", "word"),
    [(["--config", "none.toml"], "none.toml"), (["--config", "small", "--set", "loss.nonsense=3"], "loss.nonsense")],
)
def test_train_refuses_a_recipe_that_does_not_exist_and_a_setting_that_it_lacks(options, word, tmp_path, capsys):
    assert main(["train", "appearance", *options, "--output", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: --") and word in line and line.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_cohort_table_gives_unique_names_and_paths_beside_it(tmp_path):
    table = tmp_path / "cohort.csv"
    table.write_text("query,modality\na/mr.nii.gz,mr\nb/mr.nii.gz,\n\n")
    queries = read_cohort(table, "auto")
    assert [(q.name, q.modality) for q in queries] == [("mr", "mr"), ("mr_2", "auto")]
    assert Path(queries[1].path) == tmp_path / "b" / "mr.nii.gz"
    for text, word in (("file\na.nii.gz\n", "column"), ("query\n", "no scan"), ("query,modality\na,pet\n", "pet")):
        table.write_text(text)
        with pytest.raises(InputError, match=word):
            read_cohort(table, "auto")


def test_match_writes_its_output_even_where_nothing_is_confident(small_ct, tiny_model, tmp_path, capsys):
    points, output, maps = tmp_path / "p.csv", tmp_path / "found.csv", tmp_path / "maps"
    points.write_text(HEADER + "spine,4,36,60\nliver,-40,0,50\n")
    argv = ["match", str(small_ct), str(small_ct), "--points", str(points), "--output", str(output)]
    argv += ["--model", str(tiny_model), "--method", "nearest", "--similarity-map", str(maps), "--progress", "json"]
    assert main(argv) == 3
    rows = output.read_text().splitlines()
    assert rows[0].startswith(HEADER.strip()) and "confident" in rows[0]
    assert [row.split(",")[0] for row in rows[1:]] == ["spine", "liver"]
    assert len(list(maps.glob("*.nii.gz"))) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["exit_code"] == 3
    assert "error: " in captured.err and "Traceback" not in captured.err


def test_match_of_a_cohort_goes_on_after_a_bad_scan(small_ct, tiny_model, tmp_path):
    points, table, output = tmp_path / "p.csv", tmp_path / "cohort.csv", tmp_path / "found"
    points.write_text(HEADER + "spine,4,36,60\n")
    table.write_text(f"query,name\n{tmp_path}/missing.nii.gz,first\n{small_ct},second\n")
    argv = ["match", str(small_ct), "--query-list", str(table), "--points", str(points), "--output", str(output)]
    assert main([*argv, "--model", str(tiny_model), "--method", "nearest"]) in (2, 3)
    assert {path.name for path in output.iterdir()} == {"second.mrk.json", "table.csv"}
    rows = (output / "table.csv").read_text().splitlines()
    assert len(rows) == 3 and rows[1].startswith("first,") and "no such file" in rows[1]


def test_embed_writes_a_file_that_can_be_loaded_and_a_picture(small_ct, tiny_model, tmp_path):
    import SimpleITK as sitk

    from uae.embedding import Embedding

    output, picture = tmp_path / "ct.uae", tmp_path / "pca.nii.gz"
    argv = ["embed", str(small_ct), "--output", str(output), "--pca", str(picture), "--model", str(tiny_model)]
    assert main(argv) == 0
    embedding = Embedding.load(output)
    assert embedding.modality == "ct" and embedding.fine.shape[0] == 8
    image = sitk.ReadImage(str(picture))
    assert image.GetNumberOfComponentsPerPixel() == 3
    assert image.GetSize() == embedding.fine_geometry.shape[::-1]


def test_apply_carries_points_there_and_back(tmp_path):
    import SimpleITK as sitk

    transform = sitk.Euler3DTransform((10.0, 20.0, 30.0), 0.1, -0.2, 0.3, (5.0, -6.0, 7.0))
    sitk.WriteTransform(transform, str(tmp_path / "t.tfm"))
    fixed = np.array([[1.0, 2.0, 3.0], [-40.0, 50.0, 60.0]])
    (tmp_path / "fixed.csv").write_text(HEADER + "".join(f"p{i},{x},{y},{z}\n" for i, (x, y, z) in enumerate(fixed)))
    files = [str(tmp_path / name) for name in ("t.tfm", "fixed.csv", "moving.csv", "back.csv")]
    assert main(["apply", files[0], files[1], "--inverse", "--output", files[2]]) == 0
    assert main(["apply", files[0], files[2], "--output", files[3]]) == 0
    moving, back = (_coordinates(file) for file in files[2:])
    assert np.abs(moving - [transform.TransformPoint(p) for p in fixed.tolist()]).max() < 1e-3
    assert np.abs(back - fixed).max() < 1e-3


def _coordinates(file: str) -> np.ndarray:
    rows = [line.split(",") for line in Path(file).read_text().splitlines()[1:]]
    return np.array([[float(value) for value in row[1:4]] for row in rows])


@pytest.mark.skipif(os.name == "nt", reason="SIGTERM cannot be caught on Windows")
def test_sigterm_cancels_with_130_and_leaves_nothing(tmp_path):
    code = (
        "import sys, time, uae.info\n"
        "from uae.cli import main\n"
        "def slow(devices):\n"
        "    from uae.cli.common import whole_folder\n"
        "    from pathlib import Path\n"
        "    with whole_folder(Path(sys.argv[1])) as folder:\n"
        "        (folder / 'half').write_text('x')\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "uae.info.collect = slow\n"
        "sys.exit(main(['info']))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout.readline().strip() == "ready"
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert err.startswith("error: cancelled") and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_main_restores_the_signal_handler():
    before = signal.getsignal(signal.SIGTERM)
    main(["info"])
    assert signal.getsignal(signal.SIGTERM) is before
    assert cli_run.explain(InputError("two\nlines"))[1] == "two lines"


def test_a_refused_registration_is_exit_3_and_leaves_only_its_report(small_ct, tiny_model, tmp_path, capsys):
    result = tmp_path / "result"
    argv = ["register", str(small_ct), str(small_ct), "--output", str(result), "--model", str(tiny_model)]
    noise = tmp_path / "noise.nii.gz"
    _noise_scan(noise)
    argv[2] = str(noise)
    assert main([*argv, "--moving-modality", "mr"]) == 3
    assert [path.name for path in result.iterdir()] == ["report.json"]
    report = json.loads((result / "report.json").read_text())
    assert report["status"] == "refused" and report["reason"]
    assert report["inputs"]["moving"]["modality_reason"] == "given by the user"
    line = capsys.readouterr().err
    assert line.startswith("error: refused: ") and line.count("\n") == 1


def _noise_scan(path: Path) -> None:
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.random.default_rng(3).normal(300, 80, (30, 32, 34)).astype(np.float32))
    image.SetSpacing((4.0, 4.0, 4.0))
    sitk.WriteImage(image, str(path))


def test_deform_writes_what_apply_and_simpleitk_read(tmp_path):
    import SimpleITK as sitk

    scan = tmp_path / "ct.nrrd"
    sitk.WriteImage(torso_ct((20, 24, 24)), str(scan))
    result, initial = tmp_path / "result", tmp_path / "initial.tfm"
    sitk.WriteTransform(sitk.TranslationTransform(3, (6.0, -3.0, 4.0)), str(initial))
    argv = ["deform", str(scan), str(scan), "--initial", str(initial), "--output", str(result)]
    assert main(argv) == 0
    names = {path.name for path in result.iterdir()}
    assert {"report.json", "rigid.tfm", "displacement.nii.gz", "moving_in_fixed.nii.gz", "overview.png"} <= names
    field = sitk.DisplacementFieldTransform(
        sitk.Cast(sitk.ReadImage(str(result / "displacement.nii.gz")), sitk.sitkVectorFloat64)
    )
    linear = sitk.ReadTransform(str(result / "rigid.tfm"))
    fixed = np.array([[-44.0, -20.0, 60.0], [-70.0, -40.0, 80.0], [-20.0, -50.0, 40.0]])
    expected = [linear.TransformPoint(field.TransformPoint(point)) for point in fixed.tolist()]
    (tmp_path / "p.csv").write_text(HEADER + "".join(f"p,{x},{y},{z}\n" for x, y, z in fixed))
    argv = ["apply", str(result), str(tmp_path / "p.csv"), "--inverse", "--output", str(tmp_path / "o.csv")]
    assert main(argv) == 0
    assert np.abs(_coordinates(str(tmp_path / "o.csv")) - expected).max() < 0.01
