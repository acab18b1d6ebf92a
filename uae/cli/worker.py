"""`uae worker`: the long-lived helper process for live matching, over JSON lines on stdin and stdout.

A request is one line, {"id": n, "command": ..., ...}; see `uae.worker.Worker.answer` for the commands. Besides them:
{"command": "cancel", "target": id} and {"command": "shutdown"}. Answers are lines with the request's id and "event":

* ready (id null): once, at the start.
* progress: stage, percent (0..100 within the stage), eta_s (seconds left in it, or null).
* message: text, a warning that belongs to the request, such as a fall-back to the CPU.
* partial: the nearest-neighbour answer of a `match`.
* result or error (message, exit_code): exactly one, the last of its id.

A `match` with "live": true makes older unanswered live ones of its pair answer {"event": "result", "stale": true} at
once. The end of stdin ends the process, so it never outlives the one that started it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TextIO

from uae import __version__
from uae.cli.common import Session
from uae.cli.parser import add_command, add_model_options
from uae.errors import InputError

PROTOCOL = 1
GRACE_S = 2.0
"""Time that the running request has to stop by itself once nobody listens any more."""
EXAMPLE = """\
  uae worker --device cpu
    (then, as one line on stdin: {"id": 1, "command": "prepare", "pair": "a",
     "template": {"path": "ct.nii.gz", "modality": "auto"}, "query": {"path": "mr.nii.gz", "modality": "mr"}})"""


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `worker`."""
    parser = add_command(
        commands,
        "worker",
        "Hold model and embeddings and answer requests for matches, one JSON object a line on stdin and stdout. "
        "Meant for programs: 3D Slicer's live matching runs on it. It ends with its stdin.",
        EXAMPLE,
    )
    parser.set_defaults(run=run)
    add_model_options(parser)


def run(arguments: argparse.Namespace, session: Session) -> int:
    """Answer requests until stdin ends or `shutdown` comes."""
    from uae.worker import Worker

    worker = Worker(arguments.model, arguments.device, arguments.memory_mb, not arguments.no_cache)
    # the protocol gets stdout for itself: whatever a library prints goes to stderr
    own = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", newline="\n")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # a handle of its own: one that a thread still reads may not be torn down with the interpreter's
    requests = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    return _Server(worker, requests, own).serve()


ENDING: list[Callable[[], None]] = []
"""Called before this process leaves in the middle of its work."""


@dataclass(eq=False)
class _Request:
    """A request on its way."""

    id: Any
    values: dict[str, Any]
    cancelled: threading.Event = field(default_factory=threading.Event)
    answered: bool = False

    @property
    def live_pair(self) -> str | None:
        live = self.values.get("command") == "match" and self.values.get("live") is True
        return str(self.values.get("pair")) if live else None


class _Reporter(Session):
    """Progress of one request as lines of the protocol."""

    def __init__(self, server: _Server, request: _Request) -> None:
        super().__init__("json")
        self._server, self._request = server, request

    def _line(self, record: dict) -> None:
        self._server.send(self._request, "progress", record)


class _Messages(logging.Handler):
    """Warnings of the package while a request runs, as lines of the protocol."""

    def __init__(self, server: _Server) -> None:
        super().__init__(logging.WARNING)
        self._server = server

    def emit(self, record: logging.LogRecord) -> None:
        request = self._server.running
        if request is not None and record.levelno == logging.WARNING:
            self._server.send(request, "message", {"text": record.getMessage()})


class _Server:
    """Reads in a thread, so that `cancel` and newer live matches are heard while a request runs in the main one."""

    def __init__(self, worker: Any, requests: BinaryIO, answers: TextIO) -> None:
        self._worker, self._requests, self._answers = worker, requests, answers
        self._lock = threading.RLock()
        self._waiting: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._open: list[_Request] = []
        self.running: _Request | None = None

    def serve(self) -> int:
        """Answer until the end; returns the exit code 0."""
        messages = _Messages(self)
        logging.getLogger("uae").addHandler(messages)
        try:
            self._write({"id": None, "event": "ready", "protocol": PROTOCOL, "version": __version__})
            threading.Thread(target=self._read, daemon=True).start()
            while (request := self._waiting.get()) is not None:
                self.running = request
                self._answer(request)
                self.running = None
        finally:
            logging.getLogger("uae").removeHandler(messages)
        return 0

    def send(self, request: _Request, event: str, values: dict[str, Any]) -> None:
        """Write a line for a request that still waits for one; result and error are its last."""
        with self._lock:
            if request.answered:
                return
            if event in ("result", "error"):
                request.answered = True
                self._open.remove(request)
            self._write({"id": request.id, "event": event, **values})

    def _write(self, record: dict[str, Any]) -> None:
        try:
            with self._lock:
                self._answers.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
                self._answers.flush()
        except OSError:  # nobody reads any more
            self._waiting.put(None)

    def _answer(self, request: _Request) -> None:
        from uae.cli.run import explain

        if request.answered:
            return
        try:
            if request.values.get("command") == "shutdown":
                self.send(request, "result", {})
                self._waiting.put(None)
                return
            found = self._worker.answer(
                request.values,
                progress=_Reporter(self, request).progress,
                partial=lambda values: self.send(request, "partial", values),
                cancel=request.cancelled.is_set,
            )
            self.send(request, "result", found)
        except Exception as error:
            code, message = explain(error)
            if code == 1:
                logging.getLogger(__name__).error("%s", message, exc_info=error)
            self.send(request, "error", {"message": message, "exit_code": code})

    def _read(self) -> None:
        for line in self._requests:
            if line.strip():
                try:
                    self._take(line)
                except InputError as error:
                    self._write({"id": None, "event": "error", "message": str(error), "exit_code": error.exit_code})
        self._end()

    def _take(self, line: bytes) -> None:
        try:
            values = json.loads(line.decode("utf-8"))
        except ValueError as error:
            raise InputError(f"a request is not a line of JSON ({error}); send one object a line") from error
        if not isinstance(values, dict) or not isinstance(values.get("id"), (int, str)):
            raise InputError("a request needs an id (a number or text); send one object with it a line")
        request = _Request(values["id"], values)
        with self._lock:
            older = list(self._open)
            self._open.append(request)
            if values.get("command") == "cancel":
                self.send(request, "result", {"cancelled": self._cancel(older, values.get("target"))})
                return
            for other in older:
                if request.live_pair is not None and other.live_pair == request.live_pair:
                    other.cancelled.set()
                    self.send(other, "result", {"stale": True})
        self._waiting.put(request)
        if values.get("command") == "shutdown":
            self._end()

    def _cancel(self, requests: list[_Request], target: Any) -> bool:
        """Stop a request: one that only waits is answered here, a running one as soon as it looks."""
        found = [request for request in requests if request.id == target]
        for request in found:
            request.cancelled.set()
            if request is not self.running:
                self.send(request, "error", {"message": "cancelled", "exit_code": 130})
        return bool(found)

    def _end(self) -> None:
        with self._lock:
            for request in self._open:
                request.cancelled.set()
        self._waiting.put(None)
        time.sleep(GRACE_S)
        for clean_up in ENDING:
            clean_up()
        # the main thread is deep in a library that cannot be asked to stop
        os._exit(0)
