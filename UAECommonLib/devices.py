"""The devices that the network can run on, asked for by name in a child process: the application imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable

from UAECommonLib.process import Runner, make_runner
from UAECommonLib.torch_offer import torch_is_here

__all__ = ["AUTO", "CPU", "list_devices", "parse_devices"]

AUTO, CPU = "auto", "cpu"


def parse_devices(text: str) -> dict[str, str]:
    """Devices from what `uae info --json --devices` prints: name for --device to what a person reads.

    Args:
        text: the output, with any lines before and after the JSON object.

    Returns:
        Such as {"cpu": "cpu (AMD EPYC, 2 threads)", "cuda:0": "cuda:0 (NVIDIA H200)"}; only the CPU where the output
        holds no list.
    """
    try:
        found = json.loads(text[text.index("{") : text.rindex("}") + 1])["devices"]
    except (ValueError, KeyError):
        return {CPU: CPU}
    return {str(line).split(" ", 1)[0]: str(line) for line in found}


def list_devices(on_found: Callable[[dict[str, str]], None], runner: Runner | None = None) -> Runner | None:
    """Ask a child process for the devices of this computer.

    Args:
        on_found: told the devices as in `parse_devices`, at once where torch is not installed.
        runner: the process interface; made for where we are if not given.

    Returns:
        The runner, to be waited for or killed; None where nothing had to be started.
    """
    if not torch_is_here():
        on_found({CPU: CPU})
        return None
    runner = runner or make_runner()
    runner.start(["info", "--json", "--devices"], on_finished=lambda _code: on_found(parse_devices(runner.log)))
    return runner
