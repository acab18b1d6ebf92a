"""Training: exact correspondences, losses whose masks are checked by hand, and a loop that resumes exactly."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from training_parts import NARROW, tissue_block

from uae.bench.data import DataFolder
from uae.bench.validation import check_validation
from uae.cli.common import Session
from uae.errors import CancelledError, InputError, ModelError
from uae.network import NetworkConfig, UAENet
from uae.preprocess import InputMap
from uae.training import appearance, augment, features, loop, losses, sampling
from uae.training.appearance import data_root
from uae.training.config import read_config
from uae.training.data import load_subjects, phantom_subject, subject_from_volume
from uae.volume import Volume

ROOT = Path(__file__).resolve().parents[2]
SMALL_VIEWS = {"views.patch": "[16, 32, 32]", "views.positions": "16", "views.negatives_per_view": "32"}


@pytest.fixture(scope="module")
def scan() -> Volume:
    """A block of smooth tissue in air, 2 mm, HU."""
    return tissue_block()


@pytest.fixture(scope="module")
def config() -> dict:
    """The shipped configuration on small patches."""
    changes = [f"{key}={value}" for key, value in SMALL_VIEWS.items()]
    return read_config("small", [*changes, "optimiser.steps=6", "optimiser.warmup=2", "optimiser.checkpoint_every=2"])


class SmallTask(appearance.AppearanceTask):
    """The appearance task on one synthetic scan with a narrow network."""

    def __init__(self, config: dict, subjects: list) -> None:
        torch.manual_seed(0)
        self.device = torch.device("cpu")
        self.set_up(config, NARROW, InputMap(), subjects)


@pytest.fixture(scope="module")
def task_parts(config, scan):
    return config, [subject_from_volume("block", scan)]


def run(task_parts, output: Path, steps: int, resume: bool = False, **keywords) -> list[float]:
    config = copy.deepcopy(task_parts[0])
    trainer = loop.Trainer(SmallTask(config, task_parts[1]), config, output)
    if steps < 6:
        keywords["cancel"] = lambda: trainer.done >= steps
    try:
        trainer.run(resume=resume, **keywords)
    except CancelledError:
        assert steps < 6
    return [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()]


def test_view_map_inverts_its_deformation(config):
    settings = config["views"] | {"deform_probability": 1.0, "patch": [64, 96, 96]}
    view_map = sampling.draw_map(np.random.default_rng(1), settings, np.array([20.0, 30, 31]), 0.5)
    points = torch.rand(500, 3) * torch.tensor([63.0, 95, 95])
    back = view_map.to_patch(view_map.to_subject(points))
    assert view_map.displacement is not None
    assert float((back - points).norm(dim=-1).max()) < 0.05


def test_correspondences_show_the_same_anatomy(config, scan):
    subject = subject_from_volume("block", scan)
    settings = config["views"] | config["contrast"] | config["synthetic"]
    settings |= {"ct_mr_probability": 0.0, "mr_mr_probability": 0.0, "positions": 64}
    settings |= {"patch": [32, 48, 48], "deform_probability": 1.0, "field_of_view_probability": 0.0}
    pair = sampling.draw_pair(np.random.default_rng(5), [subject], settings, InputMap())
    for view in (0, 1):
        here = pair.views[view].map.to_subject(pair.cells[view] * 2 + 0.5).numpy()
        there = pair.views[1 - view].map.to_subject(pair.partners[view]).numpy()
        assert np.abs(here - there).max() < 0.05
        truth = map_coordinates(scan.array, there.T, order=1)
        seen = sampling.sample_at(subject.image, torch.from_numpy(there))[0].numpy() - 1024
        assert np.abs(truth - seen).max() < 1.0


@pytest.mark.parametrize("kind", ["ct", "mr-like", "mr", "synthetic"])
def test_views_are_repeated_by_their_seed_and_lie_in_0_1(kind, config):
    image = torch.rand(16, 24, 24) * (1 if kind == "mr" else 1500)

    def render(seed: int) -> torch.Tensor:
        drawn = augment.draw_contrast(np.random.default_rng(seed), kind, config["contrast"], (16, 24, 24))
        return augment.apply_contrasts(image[None], [drawn])[0]

    first = render(7)
    assert torch.equal(first, render(7))
    assert not torch.equal(first, render(8))
    assert float(first.min()) >= 0 and float(first.max()) <= 1 and bool(first.isfinite().all())


def test_head_at_cells_equals_the_dense_head():
    network = UAENet(NetworkConfig.light()).eval()
    pyramid = torch.randn(2, 64, 6, 7, 8)
    dense = network.fine.output(pyramid).detach()
    views = torch.tensor([0, 1, 0, 1])
    cells = torch.tensor([[0, 0, 0], [5, 6, 7], [2, 3, 4], [0, 6, 1]])
    sparse = features.head_at_cells(network.fine, pyramid, views, cells)
    assert torch.allclose(sparse, dense[views, :, cells[:, 0], cells[:, 1], cells[:, 2]], atol=1e-4)


def test_cell_corners_are_trilinear_at_the_cell_centres():
    ramp = torch.stack(torch.meshgrid(*[torch.arange(n, dtype=torch.float32) for n in (6, 7, 8)], indexing="ij"), -1)
    positions = torch.tensor([[2.5, 6.5, 8.5], [3.1, 7.9, 14.5], [0.0, 13.0, 20.0]])
    cells, weights = features.cell_corners(positions, (6, 7, 8))
    values = (ramp[cells[..., 0], cells[..., 1], cells[..., 2]] * weights[..., None]).sum(1)
    expected = torch.tensor([[1.0, 3.0, 4.0], [1.3, 3.7, 7.0], [0.0, 6.0, 7.0]])
    assert torch.allclose(values, expected, atol=1e-5)


def test_info_nce_removes_excluded_negatives():
    positive = torch.tensor([0.8])
    negative = torch.tensor([[0.2, 0.99, -0.1]])
    excluded = torch.tensor([[False, True, False]])
    value = losses.info_nce(positive, negative, excluded, 0.1)
    expected = -np.log(np.exp(8) / (np.exp(8) + np.exp(2) + np.exp(-1)))
    assert float(value) == pytest.approx(expected, abs=1e-5)
    assert float(losses.info_nce(positive, negative, torch.ones(1, 3, dtype=torch.bool), 0.1)) == pytest.approx(0.0)


def test_loss_ignores_negatives_within_the_exclusion_radius():
    rng = torch.Generator().manual_seed(0)

    def unit(count: int) -> dict:
        values = torch.nn.functional.normalize(torch.randn(count, 8, generator=rng), dim=-1)
        return {"fine": values, "coarse": values}

    query = unit(4)
    places = torch.arange(4)[:, None] * torch.tensor([[100.0, 0, 0]])
    far = {level: -values for level, values in query.items()}

    def loss(offset: float) -> float:
        negative = {level: torch.cat([query[level], far[level]]) for level in query}
        negative_mm = torch.cat([places + torch.tensor([offset, 0, 0]), places + 1e4])
        pair = losses.PairFeatures(query, query, negative, places, places, negative_mm)
        return float(losses.appearance_loss([pair], {"weights": (0.0, 1.0, 0.0)})[0])

    assert loss(7.0) < loss(9.0) - 0.5


def test_same_step_gives_the_same_loss(task_parts):
    tasks = [SmallTask(*task_parts) for _ in range(2)]
    first, second = (task.step(task.prepare(np.random.default_rng([1, 5])))[0] for task in tasks)
    assert float(first) == float(second)


def test_resume_gives_the_losses_of_an_uninterrupted_run(task_parts, tmp_path):
    whole = run(task_parts, tmp_path / "whole", 6)
    part = run(task_parts, tmp_path / "part", 3)
    assert len(part) == 3
    resumed = run(task_parts, tmp_path / "part", 6, resume=True)
    assert resumed == whole
    first, second = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("whole", "part"))
    assert all(torch.equal(first["state_dict"][key], second["state_dict"][key]) for key in first["state_dict"])


def test_checkpoint_of_another_network_is_refused_on_resume(task_parts, tmp_path):
    run(task_parts, tmp_path, 6)
    config = copy.deepcopy(task_parts[0])
    task = SmallTask(config, task_parts[1])
    task.network_config = NetworkConfig.light()
    with pytest.raises(ModelError, match="another network"):
        loop.Trainer(task, config, tmp_path).run(resume=True)


def test_full_folder_is_not_overwritten_without_resume(task_parts, tmp_path):
    run(task_parts, tmp_path, 6)
    with pytest.raises(InputError, match="--resume"):
        run(task_parts, tmp_path, 6)
    with pytest.raises(InputError, match="no checkpoint"):
        run(task_parts, tmp_path / "empty", 6, resume=True)


def test_a_step_that_is_not_finite_is_skipped(task_parts, tmp_path):
    config = copy.deepcopy(task_parts[0])
    task = SmallTask(config, task_parts[1])
    trainer = loop.Trainer(task, config, tmp_path)
    before = {name: value.clone() for name, value in task.network.named_parameters()}
    task.step = lambda rng: (sum(p.sum() for p in task.network.parameters()) * float("nan"), {})
    trainer.one_step()
    assert all(torch.equal(before[name], value) for name, value in task.network.named_parameters())
    with pytest.raises(ModelError, match="diverged"):
        for _ in range(loop.MAX_SKIPPED + 1):
            trainer.one_step()


def test_kill_leaves_a_checkpoint_that_resumes(tmp_path):
    output = tmp_path / "run"
    settings = [f"{key}={value}" for key, value in SMALL_VIEWS.items()]
    (tmp_path / "block").mkdir()
    tissue_block().write(tmp_path / "block" / "ct.nii.gz")
    settings += ['data.volumes=[{ file = "block/ct.nii.gz", modality = "ct" }]', "data.phantom_seeds=[0, 0]"]
    settings += ["optimiser.steps=500", "optimiser.checkpoint_every=1"]
    command = [sys.executable, "-m", "uae", "train", "appearance", "--config", "small", "--output", str(output)]
    command += [part for setting in settings for part in ("--set", setting)]
    environment = dict(os.environ, UAE_DATA=str(tmp_path), OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    log = output / "log.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and len(log.read_text().splitlines()) >= 4:
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    message = process.communicate()[1].decode()
    state = torch.load(output / loop.CHECKPOINT, weights_only=True)
    assert state["step"] >= 3, message
    assert set(state["network"]) == set(UAENet(NetworkConfig.light()).state_dict())


@pytest.mark.parametrize("setting", ["optimiser.stepz=3", "nothing=1", "optimiser.steps"])
def test_unknown_settings_are_named(setting):
    with pytest.raises(InputError, match="no such setting"):
        read_config("small", [setting])


def test_settings_override_and_missing_files_list_what_ships(tmp_path):
    assert read_config("small", ["optimiser.steps=12"])["optimiser"]["steps"] == 12
    with pytest.raises(InputError, match="small"):
        read_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[views\n")
    with pytest.raises(InputError, match="TOML"):
        read_config(tmp_path / "bad.toml")
    (tmp_path / "short.toml").write_text("[optimiser]\nsteps = 12\n")
    small = read_config("small")
    assert read_config(tmp_path / "short.toml") == small | {"optimiser": small["optimiser"] | {"steps": 12}}


def test_a_recipe_may_hold_settings_of_one_branch(tmp_path):
    for name in ("paper", "released"):
        probabilities = [
            read_config(name, branch=branch)["views"][key]
            for branch in ("semantic", "appearance") for key in ("mr_mr_probability", "real_mr_probability")
        ]  # fmt: skip
        assert probabilities == [0.0, 0.0, 1.0, 0.4]
    assert read_config("released", ["views.rotation_deg=3"], "semantic")["views"]["rotation_deg"] == 3
    (tmp_path / "own.toml").write_text('[branch.semantic]\n"views.rotation" = 1.0\n')
    with pytest.raises(InputError, match=r"unknown setting views\.rotation;"):
        read_config(tmp_path / "own.toml", branch="appearance")
    (tmp_path / "own.toml").write_text('[branch.semantics]\n"views.rotation_deg" = 1.0\n')
    with pytest.raises(InputError, match="no branch 'semantics'"):
        read_config(tmp_path / "own.toml")
    (tmp_path / "own.toml").write_text("[branch.semantic]\nviews.rotation_deg = 1.0\n")
    with pytest.raises(InputError, match="with the quotes"):
        read_config(tmp_path / "own.toml")


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("loss.coarse=cell", "positions, cells"),
        ("optimiser.schedule=constnat", "cosine, constant"),
        ("semantic.modalities=both", "ct, all"),
        ("optimiser.steps=0", "1 or more"),
        ("optimiser.checkpoint_every=0", "1 or more"),
        ("data.phantom_seeds=[5]", "first, last"),
        ("views.scale=[1.2, 0.8]", "low, high"),
        ("views.patch=[64, 64]", "three even numbers"),
        ("views.patch=[64, 64, 65]", "three even numbers"),
        ('crossmodal.verdicts=["acepted"]', "accepted, review"),
        ("crossmodal.preset=nope", "after-rigid"),
        ("loss.temperature=0", "above 0"),
        ('data.volumes=[{ file = "a.nii.gz", modality = "CT" }]', "a.nii.gz has modality 'CT'"),
        ('data.volumes=[{ file = "a.nii.gz" }]', "a.nii.gz has modality None"),
        ('data.volumes=[{ modality = "ct" }]', "names no file"),
    ],
)
def test_values_that_mean_nothing_are_refused_with_what_may_stand_there(setting, hint):
    with pytest.raises(InputError, match=hint):
        read_config("small", [setting])


def test_whole_numbers_may_be_written_as_2e4():
    steps = read_config("small", ["optimiser.steps=2e4", "views.patch=[8, 96, 96]"])["optimiser"]["steps"]
    assert steps == 20000 and isinstance(steps, int)


def test_only_scans_need_the_folder_of_scans(monkeypatch, tmp_path):
    monkeypatch.setenv("UAE_DATA", str(tmp_path / "none"))
    phantoms = read_config("small", ["data.volumes=[]"])
    packed = read_config("small", ["data.packed=all.npz"])
    assert data_root(phantoms, "appearance", None) == data_root(packed, "semantic", None) == Path.cwd()
    monkeypatch.setenv("UAE_DATA", str(tmp_path))
    assert data_root(packed, "semantic", None) == tmp_path.resolve()
    monkeypatch.setenv("UAE_DATA", str(tmp_path / "none"))
    pairs = read_config("small", ["data.packed=all.npz", "crossmodal.simulated_pairs=1"])
    for config, branch in ((read_config("small"), "appearance"), (pairs, "crossmodal")):
        with pytest.raises(InputError, match="UAE_DATA"):
            data_root(config, branch, None)


def test_the_budget_counts_from_the_start(monkeypatch, tmp_path):
    class Trainer:
        def __init__(self, *_):
            pass

        def run(self, resume, budget_minutes, progress, cancel):
            return budget_minutes

    clock = iter([100.0, 190.0])
    monkeypatch.setattr(appearance, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(appearance, "make_task", lambda *_: SimpleNamespace(distribute=lambda: None))
    monkeypatch.setattr(appearance, "Trainer", Trainer)
    assert appearance.train(read_config("small", ["data.volumes=[]"]), tmp_path, budget_minutes=5.0) == 3.5


def test_missing_validation_scans_are_noticed_before_the_training(tmp_path):
    with pytest.raises(InputError, match="is missing"):
        check_validation(DataFolder(tmp_path), ["hard"])
    with pytest.raises(InputError, match=r"validation\.sets"):
        check_validation(DataFolder(tmp_path), ["heard"])


def test_only_the_first_of_several_processes_speaks(capsys):
    session = Session("json")
    session.mute()
    session.say("written")
    session.progress("training", 0.5)
    session.finish(0, "done")
    assert capsys.readouterr() == ("", "")


def test_only_training_seeds_of_the_phantom_are_trained_on():
    with pytest.raises(InputError, match="not for training"):
        phantom_subject(100_000, 1.0)


@pytest.mark.parametrize("name", ["ct_lidc0001_chest/ct.nii.gz", "mr_ukatge_abdcor/mr.nii.gz", "head_mni_ctmr/a.nii"])
def test_volumes_kept_for_validation_or_testing_are_not_trained_on(name, tmp_path):
    with pytest.raises(InputError, match="kept for validation or testing"):
        load_subjects({"volumes": [{"file": name, "modality": "ct"}]}, tmp_path)
