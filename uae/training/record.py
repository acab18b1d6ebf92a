"""What a run leaves behind besides weights: a line of JSON for each step, and TensorBoard curves."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from uae.files import atomic_path

logger = logging.getLogger(__name__)

LOG = "log.jsonl"
DIGITS = 5


def step_of(line: str) -> float:
    """Step of a log line; a line that a kill has cut short belongs to no step."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class Record:
    """Appends to log.jsonl and, where it is installed, to TensorBoard; steps after `done` are removed first.

    Args:
        folder: of the run.
        done: steps whose lines are kept.
        enabled: False for all processes but the first.
    """

    def __init__(self, folder: Path, done: int, enabled: bool = True) -> None:
        self._log = self._board = None
        if not enabled:
            return
        path = folder / LOG
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if step_of(line) <= done]
            with atomic_path(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in lines))
        self._log = path.open("a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        except ImportError:
            logger.info("TensorBoard is not installed; the curves are in %s only", path)

    def write(self, step: int, active_seconds: float, figures: dict[str, float]) -> None:
        """Add the figures of a step; values that are not finite become null."""
        if self._log is None:
            return
        line: dict[str, Any] = {"step": step, "active_seconds": round(active_seconds, 1)}
        for name, value in figures.items():
            line[name] = round(value, DIGITS) if math.isfinite(value) else None
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the files."""
        for stream in (self._log, self._board):
            if stream is not None:
                stream.close()
