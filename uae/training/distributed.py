"""Several processes as one: ranks from torchrun, gathered negatives with gradients, averages of figures."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from uae.errors import InputError
from uae.training.losses import LEVELS, GlobalPool, PairFeatures

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

PATIENCE = timedelta(hours=12)
"""How long a process waits for the others: pairs take minutes each to register, and shares are uneven."""


def rank() -> int:
    """Number of this process, 0 where there is only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def join(device: str) -> str:
    """Join the processes that torchrun has started; nothing happens without it.

    Args:
        device: what --device says.

    Returns:
        The device of this process: each takes its own GPU where "auto" or "cuda" is asked for and GPUs are there.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return device
    gpu = torch.cuda.is_available() and device in ("auto", "cuda")
    if gpu:
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if gpu else "gloo", timeout=PATIENCE)
    logger.info("process %d of %d on %s", rank(), world(), device)
    return device


def leave() -> None:
    """Leave the group of processes, where this one joined."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.barrier()


def own_share(items: Sequence[Item]) -> list[Item]:
    """The items of this process: consecutive, as many for every process.

    Raises:
        InputError: they cannot be shared out evenly.
    """
    count, rest = divmod(len(items), world())
    if rest or not count:
        raise InputError(
            f"{len(items)} pairs a step for {world()} processes; choose views.pairs_per_step as a multiple of them"
        )
    return list(items[rank() * count : (rank() + 1) * count])


def strided_share(items: Sequence[Item]) -> list[Item]:
    """Every world()-th item, for work whose shares need not be even."""
    return list(items[rank() :: world()])


class _Gather(torch.autograd.Function):
    """All processes' tensors side by side; the gradient of each part returns to the process it came from."""

    @staticmethod
    def forward(context: Any, own: Tensor) -> Tensor:
        context.length = len(own)
        parts = [torch.empty_like(own) for _ in range(world())]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous()
        dist.all_reduce(total)
        start = rank() * context.length
        return total[start : start + context.length]


def gather(own: Tensor) -> Tensor:
    """(N, ..) of this process -> (world N, ..) of all, with gradients."""
    return own if world() == 1 else _Gather.apply(own)


def gather_pool(pairs: list[PairFeatures]) -> GlobalPool:
    """The random cells of the global batch."""
    own = GlobalPool.of(pairs)
    if world() == 1:
        return own
    return replace(
        own,
        features={level: gather(own.features[level]) for level in LEVELS},
        places=gather(own.places),
        subjects=gather(own.subjects),
        first=rank() * len(pairs),
    )


def average(figures: dict[str, float]) -> dict[str, float]:
    """Mean over the processes of figures that each of them may lack; the names come from all of them."""
    if world() == 1:
        return figures
    everyone: list[dict[str, float] | None] = [None] * world()
    dist.all_gather_object(everyone, figures)
    names = dict.fromkeys(name for own in everyone for name in own)
    found = {name: [own[name] for own in everyone if name in own] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}


def from_first(value: Any) -> Any:
    """The first process's value, for all."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]
