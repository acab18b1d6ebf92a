"""main(): from arguments to exit code. The one place where exceptions become messages."""

from __future__ import annotations

import argparse
import errno
import itertools
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from uae.cli.common import Session, limit_threads, set_up_logging
from uae.cli.parser import parse
from uae.errors import CancelledError, ResourceError, UAEError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments without the program's name; the process's own where None.

    Returns:
        The exit code: 0 done, 2 bad input, 3 no confident result, 4 out of memory or disk, 130 cancelled,
        1 a defect of this program.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    verbose = any(a in ("-v", "--verbose") for a in argv)
    session = Session(progress="json" if _asks_for_json(argv) else "none")
    try:
        with _termination_as_interrupt():
            arguments = parse(argv)
            session = Session(arguments.progress)
            return _run(arguments, session)
    except SystemExit as ended:  # --help and --version
        return int(ended.code or 0)
    except BaseException as error:
        code, message = explain(error)
        session.close()
        if verbose or code == 1:
            if verbose:
                traceback.print_exception(error, file=sys.stderr)
            else:
                message += "; run again with -v for the traceback and report it"
        print(f"error: {message}", file=sys.stderr)
        session.finish(code, message)
        return code


def _run(arguments: argparse.Namespace, session: Session) -> int:
    set_up_logging(arguments.verbose, session)
    limit_threads(arguments.threads)
    code = int(arguments.run(arguments, session) or 0)
    session.close()
    session.finish(code, "done")
    return code


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and one line for an exception.

    Args:
        error: what a command raised.

    Returns:
        The code of the contract (section 4) and the message, on one line; code 1 where nobody foresaw it.
    """
    if isinstance(error, UAEError):
        return error.exit_code, _one_line(error)
    if isinstance(error, KeyboardInterrupt):
        return CancelledError.exit_code, "cancelled; nothing half-written is left"
    if isinstance(error, MemoryError) or _is_torch_out_of_memory(error):
        return (
            ResourceError.exit_code,
            "out of memory; close other programs, lower --memory-mb, or use --device cpu where it was a GPU's memory",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError.exit_code, "the disk is full; free some space or choose another --output"
    return 1, f"unexpected {type(error).__name__}: {_one_line(error)}"


def _is_torch_out_of_memory(error: BaseException) -> bool:
    # by name and text: torch must not be imported here, and its CPU allocator raises a plain RuntimeError
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = str(error).lower()
    return "OutOfMemoryError" in kinds or (
        isinstance(error, RuntimeError)
        and any(words in text for words in ("out of memory", "can't allocate memory", "failed to allocate memory"))
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _asks_for_json(argv: Sequence[str]) -> bool:
    return "--progress=json" in argv or any(a == "--progress" and b == "json" for a, b in itertools.pairwise(argv))


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does, so that every `finally` still runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        logging.captureWarnings(False)
