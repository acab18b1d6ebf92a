"""`uae` as a helper process of an application: tells its number, leads a process group, never outlives its parent.

The parent holds the other end of the standard input; when that closes without a word, the parent is gone, however hard
it was killed, and the files of the job are nobody's any more.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Sequence

PARENT_GONE = 130


def run(folder: str, arguments: Sequence[str]) -> int:
    """Run one command.

    Args:
        folder: the job's temporary folder, removed where the parent vanishes; empty where there is none.
        arguments: of `uae`.

    Returns:
        The command's exit code.
    """
    # A launcher may stand between: killing it would leave this process, so its own number and group are told.
    if hasattr(os, "setsid") and os.getpgid(0) != os.getpid():
        os.setsid()
    sys.stdout.write(json.dumps({"pid": os.getpid()}) + "\n")
    sys.stdout.flush()
    talks = list(arguments[:1]) == ["worker"]  # it reads the standard input itself, and ends with it
    if talks:
        from uae.cli.worker import ENDING

        ENDING.append(lambda: _remove(folder))
    else:
        threading.Thread(target=_watch, args=(folder,), daemon=True).start()

    from uae.cli import main

    code = main(arguments)
    if talks and code == 0:
        _remove(folder)
    return code


def _watch(folder: str) -> None:
    # os.read holds no lock of sys.stdin, which the interpreter would need when it ends
    while os.read(0, 4096):
        pass
    _remove(folder)
    os._exit(PARENT_GONE)


def _remove(folder: str) -> None:
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
