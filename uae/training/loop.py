"""A training loop that resumes exactly: every step draws from its own seed, checkpoints appear whole or not at all."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from uae.errors import InputError, ModelError, UAEError
from uae.network import NetworkConfig
from uae.preprocess import InputMap
from uae.progress import Cancel, Progress, check_cancel, report
from uae.training import distributed
from uae.training.checkpoint import CHECKPOINT, check_settings, read_checkpoint, write_checkpoint
from uae.training.record import Record

logger = logging.getLogger(__name__)

MAX_SKIPPED = 20
DATA_FORMAT = 2
"""Of what is made for a run: 1 until 0.2 (pairs numbered, labelled cases not rounded)."""
MODEL, BEST_MODEL = "model.pt", "model-best.pt"

Validate = Callable[[Path], dict[str, float]]
"""Measures a model file; `score` (higher is better) decides which one is kept as the best."""


class Task(Protocol):
    """What is trained."""

    network: nn.Module
    network_config: NetworkConfig
    input_map: InputMap
    device: torch.device

    def prepare(self, rng: np.random.Generator) -> Any:
        """Everything random of one step, drawn from `rng` only; may run in a thread while the GPU works."""

    def step(self, prepared: Any) -> tuple[Tensor, dict[str, float]]:
        """Loss of a prepared step, and figures for the log."""


class Trainer:
    """AdamW or SGD with warm-up and cosine or constant rate over a number of steps, EMA weights, exact resume."""

    def __init__(
        self,
        task: Task,
        config: dict[str, Any],
        output: Path,
        branch: str = "appearance",
        explicit: frozenset[str] = frozenset(),
        validate: Validate | None = None,
    ) -> None:
        self.task, self.config, self.output = task, config, output
        self.branch, self.explicit, self.validate = branch, explicit, validate
        self.settings = config["optimiser"]
        self.network = task.network
        self.optimiser = _optimiser(self.network, self.settings)
        self.ema = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        self.done = 0
        self.skipped = 0
        self.active_seconds = 0.0
        self.best_score = -math.inf
        self._next: tuple[int, Future] | None = None

    def learning_rate(self, step: int) -> float:
        """Rate at `step`: linear warm-up, then cosine to zero at `steps`, or constant."""
        warm, total, base = self.settings["warmup"], self.settings["steps"], self.settings["learning_rate"]
        if step < warm:
            return base * (step + 1) / warm
        if self.settings.get("schedule", "cosine") == "constant":
            return base
        return base * 0.5 * (1 + math.cos(math.pi * min((step - warm) / max(total - warm, 1), 1.0)))

    def save(self) -> None:
        """Write the checkpoint of the current step; see `write_checkpoint`."""
        if distributed.rank() == 0:
            write_checkpoint(self.output / CHECKPOINT, self._state())
        distributed.barrier()

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.done,
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "ema": self.ema,
            "active_seconds": self.active_seconds,
            "network_config": self.task.network_config.to_dict(),
            "branch": self.branch,
            "config": self.config,
            "processes": distributed.world(),
            "data_format": DATA_FORMAT,
            "best_score": self.best_score,
            "skipped": self.skipped,
        }

    def load(self) -> None:
        """Go back to the last checkpoint.

        Raises:
            InputError: there is none, or it was started with other settings.
            ModelError: it is damaged or of another architecture.
        """
        path = self.output / CHECKPOINT
        state = read_checkpoint(path, self.task.network_config)
        if state.get("branch", self.branch) != self.branch:
            raise InputError(f"{path}: a run of `train {state['branch']}`; resume it with that command")
        check_settings(path, state.get("config"), self.config, self.explicit)
        if state.get("data_format", 1) != DATA_FORMAT and self.branch != "appearance":
            logger.warning(
                "%s: begun by an earlier version, which made pairs and read labelled cases in another way; pairs are "
                "registered again, and the losses will not be those of an uninterrupted run", path,
            )  # fmt: skip
        if state.get("processes", distributed.world()) != distributed.world():
            logger.warning("the run had %d processes and now has %d", state["processes"], distributed.world())
        self.network.load_state_dict(state["network"])
        try:
            self.optimiser.load_state_dict(state["optimiser"])
        except (ValueError, KeyError) as error:
            raise ModelError(f"{path}: its optimiser is of another kind ({error}); use the same optimiser.kind"
                             ) from error  # fmt: skip
        self.ema = {name: value.to(self.ema[name].device) for name, value in state["ema"].items()}
        self.done = int(state["step"])
        self.active_seconds = float(state["active_seconds"])
        self.best_score = float(state.get("best_score", -math.inf))
        self.skipped = int(state.get("skipped", 0))

    def _rng(self, step: int) -> np.random.Generator:
        return np.random.default_rng([int(self.settings["seed"]), step])

    def _prepared(self) -> Any:
        """The current step's random draws; on a GPU those of the next step are begun in a thread."""
        if self.task.device.type != "cuda":
            return self.task.prepare(self._rng(self.done))
        if self._next is not None and self._next[0] == self.done:
            prepared = self._next[1].result()
        else:
            prepared = self.task.prepare(self._rng(self.done))
        following = self.done + 1
        self._next = (following, self._pool.submit(self.task.prepare, self._rng(following)))
        return prepared

    def one_step(self) -> dict[str, float]:
        """Train one step; a step whose loss or gradient is not finite is skipped and counted.

        Raises:
            ModelError: too many such steps in a row.
        """
        rate = self.learning_rate(self.done)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        buffers = {name: value.clone() for name, value in self.network.named_buffers()}
        self.network.train()
        if self.settings.get("freeze_norm"):
            _freeze_norm(self.network)
        self.optimiser.zero_grad(set_to_none=True)
        loss, figures = self.task.step(self._prepared())
        loss.backward()
        limit = self.settings["clip"] or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), limit)
        figures = distributed.average({"loss": float(loss.detach()), **figures})
        self.done += 1
        if not math.isfinite(figures["loss"]) or not bool(torch.isfinite(norm)):
            self._skip(buffers)
            return {"loss": math.nan, "learning_rate": rate}
        self.skipped = 0
        self.optimiser.step()
        self._follow()
        return {"loss": figures.pop("loss"), "gradient": float(norm), "learning_rate": rate, **figures}

    def _skip(self, buffers: dict[str, Tensor]) -> None:
        self.skipped += 1
        for name, value in self.network.named_buffers():
            value.copy_(buffers[name])
        logger.warning("step %d: loss or gradient is not finite; skipped", self.done)
        if self.skipped > MAX_SKIPPED:
            raise ModelError("training diverged; lower optimiser.learning_rate and resume the last checkpoint")

    def _follow(self) -> None:
        """Let the EMA weights follow; with `ema_decay` 0 they are the weights themselves."""
        decay = min(self.settings["ema_decay"], (1 + self.done) / (10 + self.done))
        with torch.no_grad():
            for name, value in self.network.state_dict().items():
                if value.is_floating_point():
                    self.ema[name].lerp_(value, 1 - decay)
                else:
                    self.ema[name].copy_(value)

    def export(self, name: str = MODEL) -> Path:
        """Write the EMA weights as a model file (fp16) that `--model` takes."""
        from uae.models import save_model

        heads = ["fine", "coarse"] + (["semantic"] if self.task.network_config.semantic else [])
        meta = {
            "trained_heads": heads,
            "training": {
                "branch": self.branch,
                "steps": self.done,
                "active_minutes": round(self.active_seconds / 60, 1),
                "config": {key: value for key, value in self.config.items() if key != "device"},
            },
        }
        path = self.output / name
        save_model(path, self.ema, self.task.network_config, self.task.input_map, {}, meta)
        return path

    def run(
        self,
        resume: bool = False,
        budget_minutes: float | None = None,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> Path:
        """Train until the last step, the budget or a cancel; see `appearance.train`."""
        self.output.mkdir(parents=True, exist_ok=True)
        if resume:
            self.load()
        elif (self.output / CHECKPOINT).exists():
            raise InputError(f"{self.output}: holds a checkpoint already; add --resume or choose another --output")
        distributed.barrier()
        record = Record(self.output, self.done, enabled=distributed.rank() == 0)
        self._pool = ThreadPoolExecutor(1)
        try:
            self._loop(record, budget_minutes, progress, cancel)
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
            record.close()
        path = self.export() if distributed.rank() == 0 else self.output / MODEL
        distributed.barrier()
        return path

    def _loop(
        self, record: Record, budget_minutes: float | None, progress: Progress | None, cancel: Cancel | None
    ) -> None:
        total, every = self.settings["steps"], self.settings["checkpoint_every"]
        start, before = time.monotonic(), self.active_seconds
        budget = math.inf if budget_minutes is None else 60 * budget_minutes
        report(progress, "training", self.done / total)
        while self.done < total:
            check_cancel(cancel)
            figures = self.one_step()
            self.active_seconds = before + time.monotonic() - start
            record.write(self.done, self.active_seconds, figures)
            report(progress, "training", self.done / total)
            out_of_time = self._agreed(time.monotonic() - start > budget)
            if self._due(total):
                try:
                    self._validate(record)
                except UAEError:
                    self.save()  # the steps since the last checkpoint are good
                    raise
            if self.done % every == 0 or self.done == total or out_of_time:
                self.save()
            if out_of_time and self.done < total:
                logger.warning("time budget reached at step %d of %d; --resume goes on", self.done, total)
                break

    def _agreed(self, wish: bool) -> bool:
        """The first process's wish, so that all stop at the same step."""
        return bool(distributed.from_first(wish))

    def _due(self, total: int) -> bool:
        every = self.config.get("validation", {}).get("every", 0)
        return self.validate is not None and every > 0 and (self.done % every == 0 or self.done == total)

    def _validate(self, record: Record) -> None:
        """Measure the EMA weights and keep the best so far; the figures go beside those of the step."""
        if distributed.rank() == 0:
            path = self.export()
            figures = self.validate(path)
            record.write(self.done, self.active_seconds, {f"validation/{k}": v for k, v in figures.items()})
            logger.info("step %d: %s", self.done, figures)
            if figures.get("score", -math.inf) > self.best_score:
                self.best_score = figures["score"]
                self.export(BEST_MODEL)
        distributed.barrier()


def _optimiser(network: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    kind = settings.get("kind", "adamw")
    if kind == "adamw":
        return torch.optim.AdamW(
            network.parameters(),
            lr=settings["learning_rate"],
            betas=tuple(settings["betas"]),
            weight_decay=settings["weight_decay"],
        )
    if kind == "sgd":
        return torch.optim.SGD(
            network.parameters(),
            lr=settings["learning_rate"],
            momentum=settings["momentum"],
            weight_decay=settings["weight_decay"],
        )
    raise InputError(f"optimiser.kind = {kind!r}: unknown; use adamw or sgd")


def _freeze_norm(network: nn.Module) -> None:
    """BatchNorm with its running statistics, which then stay as they are."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
