"""Two processes: the same gradients as one with the same global batch, work shared out, figures averaged."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from training_parts import small_config, small_task, tissue_block

from uae.errors import InputError
from uae.training import distributed
from uae.training.appearance import AppearanceTask
from uae.training.semantic import SemanticTask
from uae.training.subjects import subject_from_volume
from uae.volume import Volume

HERE = Path(__file__).resolve().parent
CHANGES = ["views.pairs_per_step=4", "optimiser.freeze_norm=true", "optimiser.checkpoint_every=2"]
VARIANTS = {
    "ours": [],
    "papers": ["loss.coarse=cells", "loss.hardest=40", "loss.diverse=20", "loss.coarse_global=6",
               "loss.weights=[0.0, 1.0, 1.0]"],
}  # fmt: skip

PROCESS = """
    import os, sys
    from pathlib import Path
    import torch
    import torch.distributed as dist
    from test_training_distributed import VARIANTS, gradients, semantic_gradients
    from uae.training import distributed

    torch.set_num_threads(1)
    distributed.join("cpu")
    output = Path(sys.argv[1])
    for name in VARIANTS:
        found = gradients(name)
        if distributed.rank() == 0:
            torch.save(found, output / f"{name}.pt")
    found = semantic_gradients()
    if distributed.rank() == 0:
        torch.save(found, output / "semantic.pt")
    figures = distributed.average({"a": float(distributed.rank()), **({"b": 3.0} if distributed.rank() else {})})
    shares = distributed.strided_share(["p", "q", "r"]), distributed.own_share([0, 1, 2, 3])
    with (output / f"rank{distributed.rank()}.txt").open("w") as stream:
        stream.write(repr((figures, shares, distributed.from_first(distributed.rank()))))
    distributed.leave()
"""


def gradients(variant: str) -> dict[str, torch.Tensor]:
    """Gradients of one step of this process's share of the global batch, averaged where there are several."""
    config = small_config(*CHANGES, *VARIANTS[variant])
    subjects = [subject_from_volume(f"block{k}", tissue_block(k)) for k in (3, 4)]
    task = small_task(AppearanceTask, config, subjects, table=None)
    task.distribute()
    task.network.eval()  # BatchNorm statistics frozen
    loss, _ = task.step(task.prepare(np.random.default_rng([1, 7])))
    loss.backward()
    return {name: value.grad.clone() for name, value in task.network.named_parameters()}


def semantic_gradients(ranks: int = 1) -> list[dict[str, torch.Tensor]]:
    """Gradients of a semantic step (with `ranks` above 1: the mean of what that many processes draw), then of an
    appearance step, whose semantic head gets none."""
    subjects = []
    for k in (3, 4):
        scan = tissue_block(k)
        classes = Volume((scan.array > 60).astype(np.int16) + (scan.array > -500), scan.geometry)
        subjects.append(subject_from_volume(f"b{k}", scan, classes=classes, annotated=frozenset({1, 2})))
    config = small_config(*CHANGES, "semantic.probability=1.0")
    task = small_task(SemanticTask, config, subjects, table=None)
    task.distribute()
    task.network.eval()
    rng = np.random.default_rng([1, 8])
    if ranks == 1:
        batches = [task.prepare(rng)]
    else:
        rng.random()
        batches = [task._draw_volumes(child, 2) for child in rng.spawn(ranks)]
    found = []
    for batch in batches:
        (task.step(batch)[0] / ranks).backward()
    found.append({n: p.grad.clone() for n, p in task.network.named_parameters() if p.grad is not None})
    task.network.zero_grad()
    config["semantic"]["probability"] = 0.0
    task.step(task.prepare(np.random.default_rng([1, 9])))[0].backward()
    found.append({n: p.grad.clone() for n, p in task.network.named_parameters() if p.grad is not None})
    return found


def two_processes(*arguments: str) -> None:
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(HERE), str(HERE.parents[1])]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "process.py").write_text(textwrap.dedent(PROCESS))
    two_processes(str(folder / "process.py"), str(folder))
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_distributed_gradients_equal_those_of_one_process_with_the_same_global_batch(results, variant):
    together = torch.load(results / f"{variant}.pt", weights_only=True)
    alone = gradients(variant)
    largest = max(float(g.abs().max()) for g in alone.values())
    assert largest > 1e-3
    for name, gradient in alone.items():
        assert float((together[name] - gradient).abs().max()) < 1e-5 * max(1.0, largest), name


def test_distributed_semantic_steps_average_over_processes_and_leave_the_other_heads_alone(results):
    together = torch.load(results / "semantic.pt", weights_only=True)
    alone = semantic_gradients(ranks=2)
    for step, (found, expected) in enumerate(zip(together, alone)):
        unused = "fine." if step == 0 else "semantic."
        for name, gradient in expected.items():
            assert not name.startswith(unused) and float((found[name] - gradient).abs().max()) < 1e-5, name
        assert all(float(g.abs().max()) == 0 for name, g in found.items() if name.startswith(unused))


def test_distributed_shares_and_averages(results):
    first, second = (eval((results / f"rank{k}.txt").read_text()) for k in (0, 1))
    assert first[0] == second[0] == {"a": 0.5, "b": 3.0}
    assert first[1] == (["p", "r"], [0, 1]) and second[1] == (["q"], [2, 3])
    assert first[2] == second[2] == 0


def test_distributed_pairs_must_share_out_evenly(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 3)
    with pytest.raises(InputError, match="multiple"):
        distributed.own_share([0, 1, 2, 3])


def test_distributed_training_writes_one_checkpoint_and_log(tmp_path):
    (tmp_path / "block").mkdir()
    tissue_block().write(tmp_path / "block" / "ct.nii.gz")
    settings = [
        "views.patch=[16, 32, 32]", "views.positions=16", "views.negatives_per_view=32", "views.pairs_per_step=2",
        "optimiser.steps=2", "data.phantom_seeds=[0, 0]",
        'data.volumes=[{ file = "block/ct.nii.gz", modality = "ct" }]',
    ]  # fmt: skip
    arguments = [part for setting in settings for part in ("--set", setting)]
    two_processes(
        "-m", "uae.training", "appearance", "--config", "small", "--data", str(tmp_path), "--device", "cpu",
        "--output", str(tmp_path / "run"), *arguments,
    )  # fmt: skip
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2 and state["processes"] == 2
    assert (tmp_path / "run" / "model.pt").exists()
