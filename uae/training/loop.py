"""A training loop that resumes exactly: every step draws from its own seed, checkpoints appear whole or not at all."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from uae.errors import InputError, ModelError, ResourceError
from uae.files import atomic_path
from uae.network import NetworkConfig
from uae.preprocess import InputMap
from uae.progress import Cancel, Progress, check_cancel, report

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"
MAX_SKIPPED = 20


def _step_of(line: str) -> float:
    """Step of a log line; a line that a kill has cut short belongs to no step."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class Task(Protocol):
    """What is trained."""

    network: nn.Module
    network_config: NetworkConfig
    input_map: InputMap

    def step(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss of one step, drawn from `rng` only, and figures for the log."""


class Trainer:
    """AdamW with warm-up and cosine decay over a number of steps, gradient clipping, EMA weights, exact resume."""

    def __init__(self, task: Task, config: dict[str, Any], output: Path) -> None:
        self.task, self.config, self.output = task, config, output
        self.settings = config["optimiser"]
        self.network = task.network
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(),
            lr=self.settings["learning_rate"],
            betas=tuple(self.settings["betas"]),
            weight_decay=self.settings["weight_decay"],
        )
        self.ema = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        self.done = 0
        self.skipped = 0
        self.active_seconds = 0.0

    def learning_rate(self, step: int) -> float:
        """Rate at `step`: linear warm-up, then cosine to zero at `steps`."""
        warm, total, base = self.settings["warmup"], self.settings["steps"], self.settings["learning_rate"]
        if step < warm:
            return base * (step + 1) / warm
        return base * 0.5 * (1 + math.cos(math.pi * min((step - warm) / max(total - warm, 1), 1.0)))

    def save(self) -> None:
        """Write the checkpoint of the current step.

        Raises:
            ResourceError: the disk is full; the last checkpoint stays.
        """
        state = {
            "step": self.done,
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "ema": self.ema,
            "active_seconds": self.active_seconds,
            "network_config": self.task.network_config.to_dict(),
        }
        path = self.output / CHECKPOINT
        with atomic_path(path) as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError as error:
                raise ResourceError(f"{path}: the checkpoint could not be written; is the disk full?") from error

    def load(self) -> None:
        """Go back to the last checkpoint.

        Raises:
            InputError: there is none.
            ModelError: it is damaged or of another architecture.
        """
        path = self.output / CHECKPOINT
        if not path.exists():
            raise InputError(f"{path}: no checkpoint to resume from; start without --resume")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ModelError(f"{path}: damaged checkpoint ({error}); start again in another folder") from error
        if NetworkConfig.from_dict(state["network_config"]) != self.task.network_config:
            raise ModelError(f"{path}: checkpoint of another network; use the configuration it was started with")
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.ema = {name: value.to(self.ema[name].device) for name, value in state["ema"].items()}
        self.done = int(state["step"])
        self.active_seconds = float(state["active_seconds"])
        self._trim_log()

    def _trim_log(self) -> None:
        path = self.output / "log.jsonl"
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if _step_of(line) <= self.done]
            with atomic_path(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in lines))

    def one_step(self) -> dict[str, float]:
        """Train one step; a step whose loss or gradient is not finite is skipped and counted.

        Raises:
            ModelError: too many such steps in a row.
        """
        rng = np.random.default_rng([int(self.settings["seed"]), self.done])
        rate = self.learning_rate(self.done)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        buffers = {name: value.clone() for name, value in self.network.named_buffers()}
        self.network.train()
        self.optimiser.zero_grad(set_to_none=True)
        loss, figures = self.task.step(rng)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.settings["clip"])
        self.done += 1
        if not bool(torch.isfinite(loss)) or not bool(torch.isfinite(norm)):
            self.skipped += 1
            for name, value in self.network.named_buffers():
                value.copy_(buffers[name])
            logger.warning("step %d: loss or gradient is not finite; skipped", self.done)
            if self.skipped > MAX_SKIPPED:
                raise ModelError("training diverged; lower optimiser.learning_rate and resume the last checkpoint")
            return {"loss": math.nan, "learning_rate": rate}
        self.skipped = 0
        self.optimiser.step()
        decay = min(self.settings["ema_decay"], (1 + self.done) / (10 + self.done))
        with torch.no_grad():
            for name, value in self.network.state_dict().items():
                if value.is_floating_point():
                    self.ema[name].lerp_(value, 1 - decay)
                else:
                    self.ema[name].copy_(value)
        return {"loss": float(loss.detach()), "gradient": float(norm), "learning_rate": rate, **figures}

    def export(self) -> Path:
        """Write the EMA weights as a model file (fp16) that `--model` takes."""
        from uae.models import save_model

        meta = {
            "training": {
                "steps": self.done,
                "active_minutes": round(self.active_seconds / 60, 1),
                "config": self.config,
            }
        }
        path = self.output / "model.pt"
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
        total, every = self.settings["steps"], self.settings["checkpoint_every"]
        start = time.monotonic()
        before = self.active_seconds
        with (self.output / "log.jsonl").open("a", encoding="utf-8") as log:
            while self.done < total:
                check_cancel(cancel)
                figures = self.one_step()
                self.active_seconds = before + time.monotonic() - start
                line = {"step": self.done, "active_seconds": round(self.active_seconds, 1)}
                log.write(json.dumps(line | {k: round(v, 5) for k, v in figures.items()}) + "\n")
                log.flush()
                report(progress, "training", self.done / total)
                out_of_time = budget_minutes is not None and time.monotonic() - start > 60 * budget_minutes
                if self.done % every == 0 or self.done == total or out_of_time:
                    self.save()
                if out_of_time:
                    logger.warning("time budget reached at step %d of %d; --resume goes on", self.done, total)
                    break
        return self.export()
