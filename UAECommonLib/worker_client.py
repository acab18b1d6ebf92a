"""Talks to `uae worker`: callbacks by request, a new process after a crash, the last live match wins."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uae.errors import CancelledError, InputError, NoConfidentResultError, ResourceError, UAEError
from UAECommonLib.process import Runner, make_runner

__all__ = ["WorkerClient", "error_of"]

logger = logging.getLogger(__name__)

OnEvent = Callable[[dict[str, Any]], None]
OnError = Callable[[UAEError], None]
OPTIONS = ("worker",)


@dataclass
class _Open:
    """A request without its result yet."""

    command: str
    pair: str | None
    on_result: OnEvent | None
    on_error: OnError | None
    on_partial: OnEvent | None
    on_progress: OnEvent | None


def error_of(exit_code: int, message: str) -> UAEError:
    """The core's error for an exit code and its one line."""
    kinds: dict[int, type[UAEError]] = {
        2: InputError,
        3: NoConfidentResultError,
        4: ResourceError,
        130: CancelledError,
    }
    return kinds.get(exit_code, UAEError)(message)


class WorkerClient:
    """Holds one worker, started with the first request.

    What was loaded and prepared is remembered, and told again to a new worker where the last one crashed.

    Args:
        runner: the process interface; made for where we are if not given.
        options: further options of `uae worker`.
        on_message: told warnings, such as a fall-back to the CPU, and the log's lines.

    Attributes:
        folder: temporary files of this worker's requests; the worker removes them where this process vanishes.
    """

    def __init__(
        self, runner: Runner | None = None, options: Sequence[str] = (), on_message: Callable[[str], None] | None = None
    ) -> None:
        self.runner = runner or make_runner()
        self.on_message = on_message
        self._arguments = [*OPTIONS, *options]
        self._numbers = itertools.count(1)
        self._open: dict[int, _Open] = {}
        self._load: dict[str, Any] | None = None
        self._prepared: dict[str, dict[str, Any]] = {}
        self._known: set[str] = set()
        self.starts = 0
        self.folder: str | Path = ""

    @property
    def busy(self) -> bool:
        """Whether a request waits for its result."""
        return bool(self._open)

    def load(self, model: str | None, device: str, **callbacks: Any) -> int:
        """Choose model and device for what is prepared from now on; see `request`."""
        values = {"model": model, "device": device}
        self._ensure_running()
        self._load = values
        return self._send("load", None, values, **callbacks)

    def prepare(
        self,
        pair: str,
        template: dict[str, str],
        query: dict[str, str],
        model: str | None = None,
        device: str | None = None,
        **callbacks: Any,
    ) -> int:
        """Embed and relate a pair; template and query are {"path", "modality"}; see `request`.

        Model and device are those of `load` where not given.
        """
        values = {"pair": pair, "template": template, "query": query, "model": model, "device": device}
        self._ensure_running()
        self._prepared[pair] = values
        self._known.add(pair)
        return self._send("prepare", pair, values, **callbacks)

    def forget(self, pair: str) -> None:
        """Let the worker drop a pair."""
        self._prepared.pop(pair, None)
        if pair in self._known and self.runner.running:
            self._send("forget", pair, {"pair": pair})
        self._known.discard(pair)

    def match(
        self,
        pair: str,
        points: Sequence[Sequence[float]],
        labels: Sequence[str],
        method: str = "auto",
        side: int = 5,
        live: bool = False,
        **callbacks: Any,
    ) -> int:
        """Match points (N x 3, LPS mm in the template's own space) of a prepared pair.

        A live match makes older live ones of its pair stale: these never call back, so a live request has to hold all
        points that are still to be answered.
        """
        values = {
            "pair": pair,
            "points": [[float(value) for value in point] for point in points],
            "labels": list(labels),
            "method": method,
            "side": side,
            "live": live,
        }
        return self.request("match", pair, values, **callbacks)

    def similarity_map(
        self, pair: str, point: Sequence[float], output: str, method: str = "auto", **callbacks: Any
    ) -> int:
        """Write the similarity of one template point (LPS mm) to every place of the query, as the method sees it."""
        values = {"pair": pair, "point": [float(value) for value in point], "output": output, "method": method}
        return self.request("similarity_map", pair, values, **callbacks)

    def request(self, command: str, pair: str | None, values: dict[str, Any], **callbacks: Any) -> int:
        """Send a request; a worker that crashed is started again and told what it has to know.

        Args:
            command: of the protocol.
            pair: name of the pair it belongs to, or None.
            values: what belongs to the command.
            callbacks: on_result(record), on_error(error), on_partial(record), on_progress(record).

        Returns:
            The request's number, for `cancel`.

        Raises:
            InputError: Python cannot be started.
        """
        self._ensure_running()
        if pair is not None and pair not in self._known and pair in self._prepared:
            self._known.add(pair)
            self._send("prepare", pair, self._prepared[pair], on_progress=callbacks.get("on_progress"))
        return self._send(command, pair, values, **callbacks)

    def cancel(self, number: int) -> None:
        """Stop a request; its on_error is told CancelledError."""
        if number in self._open and self.runner.running:
            self._send("cancel", None, {"target": number})

    def is_open(self, number: int) -> bool:
        """Whether a request still waits for its result."""
        return number in self._open

    def pump(self, timeout: float = 0.0) -> None:
        """Deliver what has arrived (needed only where no event loop does it)."""
        self.runner.pump(timeout)

    def wait(self, number: int, timeout: float | None = None) -> bool:
        """Wait for a request's result; True where it arrived (or the worker ended)."""
        return self.runner.wait(lambda: number not in self._open, timeout)

    def close(self) -> None:
        """End the worker now; open requests are told CancelledError."""
        self.runner.kill()

    def _ensure_running(self) -> None:
        if self.runner.running:
            return
        self._known.clear()
        self.runner.start(self._arguments, self._on_line, self._on_finished, self._log, self.folder)
        self.starts += 1
        if self._load is not None:
            self._send("load", None, self._load)

    def _send(
        self,
        command: str,
        pair: str | None,
        values: dict[str, Any],
        on_result: OnEvent | None = None,
        on_error: OnError | None = None,
        on_partial: OnEvent | None = None,
        on_progress: OnEvent | None = None,
    ) -> int:
        number = next(self._numbers)
        self._open[number] = _Open(command, pair, on_result, on_error, on_partial, on_progress)
        try:
            self.runner.write(json.dumps({"id": number, "command": command, **values}, ensure_ascii=False))
        except ResourceError:
            # its end has not been told yet; `_on_finished` answers this request together with the others
            logger.info("the helper process ended before a request reached it")
        return number

    def _on_line(self, record: dict[str, Any]) -> None:
        event, number = record.get("event"), record.get("id")
        if event == "message":
            self._log(str(record.get("text", "")))
            return
        waiting = self._open.get(number) if isinstance(number, int) else None
        if waiting is None:
            return
        if event == "progress":
            _tell(waiting.on_progress, record)
        elif event == "partial":
            _tell(waiting.on_partial, record)
        elif event == "result":
            del self._open[number]
            if not record.get("stale"):
                _tell(waiting.on_result, record)
        elif event == "error":
            del self._open[number]
            self._failed(waiting, error_of(int(record.get("exit_code", 1)), str(record.get("message", ""))))

    def _failed(self, waiting: _Open, error: UAEError) -> None:
        if waiting.command == "prepare" and waiting.pair is not None:
            self._known.discard(waiting.pair)
        if waiting.on_error is not None:
            waiting.on_error(error)
        elif not isinstance(error, CancelledError):
            self._log(str(error))

    def _on_finished(self, exit_code: int) -> None:
        self._known.clear()
        waiting, self._open = list(self._open.values()), {}
        if exit_code == 130:
            error: UAEError = CancelledError("cancelled; the helper process was ended")
        else:
            lines = self.runner.log.strip().splitlines()
            last = f": {lines[-1]}" if lines else ""
            error = ResourceError(f"the helper process ended unexpectedly (code {exit_code}{last}); try again")
        for one in waiting:
            self._failed(one, error)

    def _log(self, text: str) -> None:
        logger.info("%s", text)
        if self.on_message is not None:
            self.on_message(text)


def _tell(listener: OnEvent | None, record: dict[str, Any]) -> None:
    if listener is not None:
        listener(record)
