"""Where the network runs: choice of device, number type and what to say about them."""

from __future__ import annotations

import math
import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING

from uae.errors import InputError

if TYPE_CHECKING:
    import torch


CPU_SECONDS_PER_MILLION_CELLS = 2.4
"""Embedding a million cells of 2 mm on two cores (AMD EPYC Zen 3, fp32): 39.5 s for a whole torso (our measurement)."""
REGISTER_FACTOR, REGISTER_START_S = 2.2, 10.0
"""A registration takes as long as its embeddings once more, for matching and refinement, and some seconds to start (the
same machine: 45 s for an abdomen, 30 s for a chest)."""
MOST_USEFUL_CORES = 8


def expected_cpu_time(million_cells: float, register: bool = False) -> str:
    """How long the CPU will need, in words for a person who expected a GPU.

    Args:
        million_cells: volume of the scans' boxes in millions of 8 mm^3, all of them together.
        register: also match and refine.

    Returns:
        Such as "about 40 s" or "about 3 min".
    """
    cores = min(os.cpu_count() or 1, MOST_USEFUL_CORES)
    seconds = million_cells * CPU_SECONDS_PER_MILLION_CELLS * 2 / cores
    if register:
        seconds = REGISTER_START_S + REGISTER_FACTOR * seconds
    return (
        f"about {max(10, 10 * math.ceil(seconds / 10))} s" if seconds <= 90 else f"about {math.ceil(seconds / 60)} min"
    )


def resolve_device(name: str = "auto") -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:N` into a device that exists here.

    Raises:
        InputError: the name is unknown, or there is no such GPU.
    """
    import torch

    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise InputError(f"unknown device {name!r}; use --device auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(match.group(1) or 0)
    if index >= count:
        raise InputError(f"device {name!r} is not here ({count} CUDA GPU found); use --device auto or cpu")
    return torch.device("cuda", index)


def inference_dtype(device: torch.device) -> torch.dtype:
    """Fastest number type that is safe for the network on `device`.

    A GPU computes in bf16 (fp16 before Ampere). A CPU gets bf16 only where it has bf16 arithmetic (AMX or AVX512-BF16):
    elsewhere bf16 is emulated, slower than fp32.
    """
    import torch

    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.bfloat16 if any(check is not None and check() for check in checks) else torch.float32


def describe_device(device: torch.device) -> str:
    """One line for reports, such as `cpu (AMD EPYC, 2 threads)` or `cuda:0 (NVIDIA H200)`."""
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({cpu_name()}, {torch.get_num_threads()} threads)"


def cpu_name() -> str:
    """Name of the processor as the operating system gives it."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory (of a GPU or of the machine) ran out."""
    text = str(error)
    if isinstance(error, RuntimeError):  # torch's own kind for GPUs is a RuntimeError, too
        return "out of memory" in text or "can't allocate memory" in text
    return isinstance(error, MemoryError)
