"""The process runner outside the application: lines, log, exit code, cancel, kill."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from uae.errors import InputError, ResourceError
from UAECommonLib.process import SubprocessRunner, child_environment, make_runner

TIMEOUT_S = 120.0


def test_lines_log_and_exit_code_arrive_in_the_calling_thread():
    runner, lines, log, ends = make_runner(), [], [], []
    assert isinstance(runner, SubprocessRunner)
    runner.start(
        ["embed", "no such ä.nii.gz", "--output", "x.uae", "--progress", "json"], lines.append, ends.append, log.append
    )
    assert runner.running
    with pytest.raises(InputError, match="still runs"):
        runner.start(["info"])
    assert runner.wait(timeout=TIMEOUT_S) and not runner.running
    assert ends == [2] and runner.exit_code == 2
    assert lines[-1]["stage"] == "finished" and "no such ä.nii.gz" in lines[-1]["message"]
    assert log[-1].startswith("error: ") and log[-1] in runner.log


def test_the_running_uae_comes_first_whatever_else_is_installed(monkeypatch, tmp_path):
    (tmp_path / "uae").mkdir()
    (tmp_path / "uae" / "__init__.py").write_text("raise ImportError('not the running one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    runner = SubprocessRunner()
    runner.start(["--version"])
    assert runner.wait(timeout=TIMEOUT_S) and runner.exit_code == 0


def test_cancel_ends_the_child_with_130_and_kill_leaves_no_zombie():
    for end in ("cancel", "kill"):
        runner, ends = SubprocessRunner(), []
        runner.start(["worker"], on_finished=ends.append)
        pid = runner._process.pid
        runner.pump(0.1)
        getattr(runner, end)()
        assert runner.wait(timeout=TIMEOUT_S)
        assert ends == [130] and runner.cancelled and not runner.running
        assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(ResourceError):
        runner.write("{}")
    runner.kill()
    runner.cancel()


def test_a_listener_that_fails_does_not_stop_the_delivery():
    seen = []

    def listen(record: dict) -> None:
        seen.append(record)
        raise ZeroDivisionError

    runner = SubprocessRunner()
    runner.start(["worker"], on_line=listen)
    assert runner.wait(lambda: bool(seen), TIMEOUT_S)
    runner.write('{"id": 1, "command": "dance"}')
    assert runner.wait(lambda: len(seen) > 1, TIMEOUT_S)
    assert seen[0]["event"] == "ready" and seen[1]["exit_code"] == 2
    runner.write('{"id": 2, "command": "shutdown"}')
    assert runner.wait(timeout=TIMEOUT_S) and runner.exit_code == 0


def test_a_child_that_ignores_the_request_to_stop_is_killed(monkeypatch, tmp_path):
    monkeypatch.setattr("UAECommonLib.process.GRACE_S", 0.2)
    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('{\"on\": 1}', flush=True)\ntime.sleep(60)"
    (tmp_path / "uae").mkdir()
    (tmp_path / "uae" / "__init__.py").touch()
    (tmp_path / "uae" / "child.py").write_text(f"import signal, time\n{stubborn}")
    monkeypatch.setattr("UAECommonLib.process.ROOT", str(tmp_path))
    runner, lines = SubprocessRunner(), []
    runner.start([], on_line=lines.append)
    assert runner.wait(lambda: bool(lines), TIMEOUT_S)
    start = time.monotonic()
    runner.cancel()
    assert runner.wait(timeout=TIMEOUT_S) and runner.exit_code == 130
    assert time.monotonic() - start < 50


@pytest.mark.skipif(os.name == "nt", reason="the parent is killed by a signal")
@pytest.mark.parametrize("command", [["phantom", "--seed", "200005", "--output"], ["worker"]])
def test_a_child_does_not_outlive_a_parent_that_was_killed_hard(tmp_path, command):
    folder = tmp_path / "job ä"
    folder.mkdir()
    (folder / "volume.nrrd").write_bytes(b"voxels")
    arguments = [*command, str(folder / "out")] if command[0] == "phantom" else command[:1]
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder), *arguments],
        stdout=subprocess.PIPE,
        env={**os.environ, **child_environment()},
        text=True,
    )
    child = int(parent.stdout.readline())
    assert alive(child)
    parent.kill()
    parent.wait()
    end = time.monotonic() + TIMEOUT_S
    while (alive(child) or folder.exists()) and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive(child) and not folder.exists()


PARENT = """
import sys, time
from UAECommonLib.process import SubprocessRunner
runner = SubprocessRunner()
runner.start(sys.argv[2:], folder=sys.argv[1])
runner.wait(lambda: runner._child_pid is not None)
print(runner._child_pid, flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
