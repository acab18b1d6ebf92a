"""The loop under bad luck: killed at random moments, full disk, other settings, other data, no numbers."""

from __future__ import annotations

import copy
import json
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from training_parts import NARROW, small_config, small_task, tissue_block

from uae.errors import InputError, ModelError, ResourceError
from uae.training import loop
from uae.training.appearance import AppearanceTask, start_from
from uae.training.config import complete, explain, read_config, shipped
from uae.training.data import load_subjects
from uae.training.pack import body_box, read_packed, write_packed
from uae.training.pieces import join_pieces, split_file
from uae.training.settings import SETTINGS
from uae.training.subjects import subject_from_volume

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def subjects():
    return [subject_from_volume("block", tissue_block())]


def trainer_for(config: dict, subjects: list, output: Path, **keywords) -> loop.Trainer:
    return loop.Trainer(small_task(AppearanceTask, config, subjects, table=None), config, output, **keywords)


def losses_of(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()]


KILLED = """
    import os, random, signal, sys, time
    from pathlib import Path
    import torch
    import torch._dynamo
    import torch.utils.tensorboard  # before the forks: importing it takes longer than the training
    from training_parts import small_config, small_task, tissue_block
    from uae.training import loop
    from uae.training.appearance import AppearanceTask
    from uae.training.subjects import subject_from_volume

    torch.set_num_threads(1)
    subjects = [subject_from_volume("block", tissue_block())]
    config = small_config("optimiser.steps=10", "optimiser.checkpoint_every=1")

    def train(output, resume):
        task = small_task(AppearanceTask, config, subjects, table=None)
        loop.Trainer(task, config, output).run(resume)

    def in_child(output, resume, seconds):
        child = os.fork()
        if child == 0:
            train(output, resume)
            os._exit(0)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and os.waitpid(child, os.WNOHANG)[0] == 0:
            time.sleep(0.005)
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            return False
        return True

    whole, part = Path(sys.argv[1]), Path(sys.argv[2])
    start = time.monotonic()
    in_child(whole, False, 600)
    seconds = time.monotonic() - start
    random.seed(5)
    kills = 0
    for _ in range(30):
        resume = (part / loop.CHECKPOINT).exists()
        kills += in_child(part, resume, random.uniform(0.1, 0.5) * seconds)
        if kills >= 3 and (part / loop.CHECKPOINT).exists():
            break
    in_child(part, True, 600)
    print(kills)
"""


def test_resume_after_kills_at_random_moments_gives_the_losses_of_an_uninterrupted_run(tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(HERE), str(HERE.parents[1])]))
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(whole), str(part)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 2
    assert len(losses_of(whole)) == 10 and losses_of(part) == losses_of(whole)
    first, second = (torch.load(p / loop.CHECKPOINT, weights_only=True) for p in (whole, part))
    for name in ("network", "ema"):
        assert all(torch.equal(first[name][key], second[name][key]) for key in first[name])


def test_full_disk_during_a_checkpoint_keeps_the_last_good_one(subjects, tmp_path):
    config = small_config("optimiser.checkpoint_every=2")
    trainer = trainer_for(config, subjects, tmp_path)
    trainer.one_step()
    trainer.save()
    size = (tmp_path / loop.CHECKPOINT).stat().st_size
    before = (tmp_path / loop.CHECKPOINT).read_bytes()
    trainer.one_step()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        with pytest.raises(ResourceError, match="last checkpoint is intact"):
            trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / loop.CHECKPOINT).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [loop.CHECKPOINT]
    assert ResourceError.exit_code == 4
    again = trainer_for(config, subjects, tmp_path)
    again.load()
    assert again.done == 1


def test_resume_refuses_other_settings_unless_they_are_asked_for(subjects, tmp_path):
    config = small_config()
    trainer = trainer_for(config, subjects, tmp_path)
    trainer.one_step()
    trainer.save()
    other = copy.deepcopy(config)
    other["optimiser"]["steps"] = 9
    with pytest.raises(InputError, match=r"optimiser\.steps = 6, now it is 9.*--set optimiser\.steps"):
        trainer_for(other, subjects, tmp_path).load()
    trainer_for(other, subjects, tmp_path, explicit=frozenset({"optimiser.steps"})).load()
    data = copy.deepcopy(config)
    data["data"]["volumes"] = data["data"]["volumes"][1:]
    with pytest.raises(InputError, match=r"data\.volumes"):
        trainer_for(data, subjects, tmp_path).load()
    elsewhere = copy.deepcopy(config) | {"device": "cpu", "threads": 2}
    elsewhere["optimiser"]["checkpoint_every"] = 7
    trainer_for(elsewhere, subjects, tmp_path).load()
    with pytest.raises(InputError, match="train appearance"):
        trainer_for(config, subjects, tmp_path, branch="semantic").load()


def test_checkpoint_of_the_earlier_format_resumes(subjects, tmp_path, caplog):
    config = small_config()
    trainer = trainer_for(config, subjects, tmp_path)
    trainer.one_step()
    state = trainer._state()
    old = {k: state[k] for k in ("step", "network", "optimiser", "ema", "active_seconds", "network_config")}
    torch.save(old, tmp_path / loop.CHECKPOINT)
    again = trainer_for(config, subjects, tmp_path)
    again.load()
    assert again.done == 1 and "earlier version" in caplog.text
    assert again.one_step()["loss"] == trainer.one_step()["loss"]


def test_damaged_checkpoint_is_named(subjects, tmp_path):
    (tmp_path / loop.CHECKPOINT).write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(ModelError, match="damaged checkpoint"):
        trainer_for(small_config(), subjects, tmp_path).load()


def test_validation_keeps_the_best_model_and_survives_a_resume(subjects, tmp_path):
    scores = iter([0.2, 0.5, 0.4])
    config = small_config("validation.every=2")
    trainer = trainer_for(config, subjects, tmp_path, validate=lambda path: {"score": next(scores), "mm": 3.0})
    trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["validation/score"] for line in lines if "validation/score" in line] == [0.2, 0.5, 0.4]
    best = torch.load(tmp_path / loop.BEST_MODEL, weights_only=True)
    assert best["meta"]["training"]["steps"] == 4
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_failed_validation_keeps_the_steps(subjects, tmp_path):
    def fails(path):
        raise InputError("a scan is gone")

    config = small_config("validation.every=3", "optimiser.checkpoint_every=100")
    with pytest.raises(InputError, match="gone"):
        trainer_for(config, subjects, tmp_path, validate=fails).run()
    again = trainer_for(config, subjects, tmp_path)
    again.load()
    assert again.done == 3


def test_budget_stops_after_a_saved_step(subjects, tmp_path):
    trainer = trainer_for(small_config(), subjects, tmp_path)
    trainer.run(budget_minutes=0.0)
    assert torch.load(tmp_path / loop.CHECKPOINT, weights_only=True)["step"] == 1


def test_sgd_with_a_constant_rate_and_without_averaging_is_the_papers_optimiser(subjects, tmp_path):
    config = small_config(
        "optimiser.kind=sgd", "optimiser.schedule=constant", "optimiser.ema_decay=0.0", "optimiser.clip=0.0",
        "optimiser.learning_rate=0.02", "optimiser.weight_decay=0.0",
    )  # fmt: skip
    trainer = trainer_for(config, subjects, tmp_path)
    assert [trainer.learning_rate(k) for k in (0, 1, 2, 5)] == pytest.approx([0.01, 0.02, 0.02, 0.02])
    weight = trainer.network.fine.output.weight
    before = weight.detach().clone()
    trainer.one_step()
    assert torch.allclose(weight.detach(), before - 0.01 * weight.grad, atol=1e-7)
    assert torch.equal(trainer.ema["fine.output.weight"], weight.detach())


def test_every_setting_is_explained_and_every_configuration_is_whole():
    for name in ("small", "paper", "released"):
        config = {table: values for table, values in shipped(name).items() if table != "branch"}
        assert {f"{t}.{k}" for t, values in config.items() for k in values} == set(SETTINGS)
        assert complete(config) == config
    text = explain()
    assert all(key in text for key in SETTINGS) and "1.0 | 0.0 | 0.0" in text
    assert shipped("paper")["loss"]["temperature"] == 0.5 and shipped("released")["semantic"]["temperature"] == 0.1


@pytest.mark.parametrize(
    ("setting", "words"),
    [("optimiser.steps=many", "a int is needed"), ("views.patch=3", "a list is needed"),
     ("semantic.background=1", "a bool is needed"), ("loss.temprature=0.1", "no such setting")],
)  # fmt: skip
def test_settings_of_another_kind_are_refused(setting, words):
    with pytest.raises(InputError, match=words):
        read_config("small", [setting])


def test_no_volumes_one_volume_and_values_that_are_no_numbers(tmp_path):
    with pytest.raises(InputError, match="no training volumes"):
        load_subjects({"volumes": []}, tmp_path)
    scan = tissue_block()
    scan.write(tmp_path / "one.nii.gz")
    entry = {"file": "one.nii.gz", "modality": "ct"}
    one = load_subjects({"volumes": [entry]}, tmp_path)
    task = small_task(AppearanceTask, small_config(), one, table=None)
    assert np.isfinite(float(task.step(task.prepare(np.random.default_rng(0)))[0].detach()))  # one volume is enough
    scan.array[3, 3, 3] = np.nan
    with pytest.raises(InputError, match="not numbers"):
        subject_from_volume("holes", scan)


def test_views_larger_than_any_scan_say_so(subjects):
    config = small_config("views.patch=[16, 64, 64]", "views.scale=[3.0, 3.1]", "views.positions=1600")
    task = small_task(AppearanceTask, config, subjects, table=None)
    with pytest.raises(InputError, match="too little of a patient"):
        task.prepare(np.random.default_rng(0))


def test_start_from_another_architecture_is_refused(tmp_path):
    from uae.models import save_model
    from uae.network import UAENet
    from uae.preprocess import InputMap

    network = UAENet(NARROW)
    save_model(tmp_path / "m.pt", network.state_dict(), NARROW, InputMap(), {}, {}, half=False)
    other = UAENet(NARROW.from_dict({**NARROW.to_dict(), "semantic": True}))
    start_from(other, str(tmp_path / "m.pt"))
    assert torch.equal(other.fine.output.weight, network.fine.output.weight)
    wider = UAENet(NARROW.from_dict({**NARROW.to_dict(), "head_channels": 16}))
    with pytest.raises(InputError, match="another architecture"):
        start_from(wider, str(tmp_path / "m.pt"))


def test_checkpoints_travel_in_pieces(tmp_path):
    content = np.random.default_rng(0).integers(0, 256, 100_000).astype(np.uint8).tobytes()
    (tmp_path / "checkpoint.pt").write_bytes(content)
    pieces = split_file(tmp_path / "checkpoint.pt", tmp_path / "pieces", 30_000)
    assert [p.stat().st_size for p in pieces] == [30_000, 30_000, 30_000, 10_000]
    assert join_pieces(tmp_path / "pieces", tmp_path / "back").read_bytes() == content
    pieces[2].write_bytes(b"x" * 30_000)
    with pytest.raises(InputError, match="damaged"):
        join_pieces(tmp_path / "pieces", tmp_path / "again.pt")
    assert not (tmp_path / "again.pt").exists()
    pieces[1].unlink()
    with pytest.raises(InputError, match="missing"):
        join_pieces(tmp_path / "pieces", tmp_path / "again.pt")


def test_packed_volumes_give_the_same_views(tmp_path):
    scan = tissue_block()
    mr = tissue_block(5)
    mr.modality = "mr"
    subjects = [subject_from_volume("a", scan, weight=2.0), subject_from_volume("b", mr)]
    assert write_packed(tmp_path / "all.npz", subjects) == 1
    packed = read_packed(tmp_path / "all.npz")
    assert [(s.name, s.modality, s.weight) for s in packed] == [("a", "ct", 2.0), ("b", "mr", 1.0)]
    for before, after in zip(subjects, packed):
        box = body_box(before.mask)
        assert np.array_equal(after.mask, before.mask[box]) and (after.mask == 2).sum() == (before.mask == 2).sum()
        step = 0.5 if before.modality == "ct" else 0.5 / 4095
        assert float((after.image[0, 0] - before.image[0, 0][box]).abs().max()) <= step + 1e-5
        assert len(after.body_cells) > 0
    exact = (tmp_path / "all.npz").stat().st_size
    assert write_packed(tmp_path / "small.npz", subjects, exact * 2 // 3) > 1
    assert (tmp_path / "small.npz").stat().st_size <= exact * 2 // 3
    with pytest.raises(InputError, match="fewer volumes"):
        write_packed(tmp_path / "tiny.npz", subjects, 1000)
    assert not (tmp_path / "tiny.npz").exists()
    (tmp_path / "bad.npz").write_bytes(b"PK nothing")
    with pytest.raises(InputError, match="no usable packed file"):
        read_packed(tmp_path / "bad.npz")
    loaded = load_subjects({"packed": "all.npz", "volumes": [{"file": "none", "modality": "ct"}]}, tmp_path)
    assert [s.name for s in loaded] == ["a", "b"]


def test_time_left_of_a_resumed_training_counts_from_where_it_resumed(monkeypatch, capsys):
    from uae.cli import common

    clock = iter([100.0, 110.0])
    monkeypatch.setattr(common.time, "monotonic", lambda: next(clock))
    session = common.Session("json")
    session.progress("training", 0.5)
    session.progress("training", 0.6)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["eta_s"] is None and lines[1]["eta_s"] == pytest.approx(40.0)
