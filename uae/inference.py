"""One pass of the network over a whole volume within a memory bound, equal to a dense pass.

The stem and the first stages hold most of the activations, so they run in slabs along z with as many slices of real
context on both sides as their kernels reach; zero padding acts only at the true ends, as in a dense pass. The later
stages run on the then small grids. The heads on the half-resolution grid run in slabs again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from uae.device import expected_cpu_time, inference_dtype, is_out_of_memory
from uae.errors import ResourceError
from uae.progress import Cancel, Progress, check_cancel, report

if TYPE_CHECKING:
    import torch

    from uae.models import Model
    from uae.network import NetworkConfig, PyramidHead, UAENet

STAGE = "embedding"
MAP_COPIES = 6
"""Full-size copies of a map alive at once in a residual block (input, shortcut, two convolutions, workspace) or in a
head (lateral, up-sampled map, sum, convolution, normalised map, workspace): our count."""
SMALLEST_SHARE = 0.1
"""Share of the memory bound that slabs may take where stored maps and results already exceed the rest."""
TRIES_ON_GPU = 4

logger = logging.getLogger(__name__)


def run_model(
    model: Model,
    image: np.ndarray,
    device: torch.device,
    memory_mb: float = 2000.0,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> dict[str, np.ndarray]:
    """Embed one normalised image; smaller slabs and at last the CPU take over where a GPU's memory ends.

    Args:
        model: the weights.
        image: float32 (z, y, x), sizes multiples of the model's coarse stride.
        device: where to compute.
        memory_mb: bound on activations and results, megabytes.
        progress: told the fraction done.
        cancel: asked between slabs.

    Returns:
        Unit vectors by head, float16 (C, z, y, x).

    Raises:
        ResourceError: the machine's memory is exhausted.
        CancelledError: the user stopped the work.
    """
    import torch

    if device.type == "cuda":
        for attempt in range(TRIES_ON_GPU):
            bound = min(memory_mb, torch.cuda.mem_get_info(device)[0] / 1e6) / 2**attempt
            try:
                return run_network(model.network(device), image, inference_dtype(device), bound, progress, cancel)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the handler: the traceback would keep the failed pass's tensors alive.
            torch.cuda.empty_cache()
            logger.warning("out of GPU memory with a bound of %.0f MB; trying thinner slabs", bound)
        expected = expected_cpu_time(image.size / 1e6)
        logger.warning(
            "out of GPU memory on %s; the CPU takes over: expect %s", device, expected, extra={"fallback_device": "cpu"}
        )
        device = torch.device("cpu")
    try:
        return run_network(model.network(device), image, inference_dtype(device), memory_mb, progress, cancel)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(
            f"not enough memory to embed {image.shape} voxels of 2 mm; close other programs or crop the volume"
        ) from error


def run_network(
    network: UAENet,
    image: np.ndarray,
    dtype: torch.dtype,
    memory_mb: float = 2000.0,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
    slab: int | None = None,
) -> dict[str, np.ndarray]:
    """The same on the network's own device, in number type `dtype`.

    Args:
        network: in evaluation mode.
        image: float32 (z, y, x), sizes multiples of the coarse stride.
        dtype: fp32, or bf16 / fp16 for the convolutions.
        memory_mb: bound on activations and results, megabytes.
        progress: told the fraction done.
        cancel: asked between slabs.
        slab: input slices of a slab (rounded up to the network's stride); from `memory_mb` where None.

    Returns:
        Unit vectors by head, float16 (C, z, y, x); similarities are to be summed in fp32.
    """
    import torch

    device = next(network.parameters()).device
    early, late = slab_slices(network.config, image.shape, torch.finfo(dtype).bits // 8, memory_mb)
    if slab is not None:
        early = late = slab
    logger.debug(
        "embedding %s voxels on %s as %s in slabs of %d and %d slices", image.shape, device, dtype, early, late
    )
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        maps = network.stages(_early_in_slabs(network, image, device, dtype, early, progress, cancel))
        check_cancel(cancel)
        report(progress, STAGE, 0.7)
        heads = {"fine": network.fine, "semantic": network.semantic}
        heads = {name: head for name, head in heads.items() if head is not None}
        found = {"coarse": _unit_half(network.coarse(maps[3:])).cpu().numpy()[0]}
        for index, (name, head) in enumerate(heads.items()):
            found[name] = _head_in_slabs(head, maps[:3], -(-late // network.config.fine_stride[0]), cancel)
            report(progress, STAGE, 0.7 + 0.3 * (index + 1) / len(heads))
    return found


def slab_slices(config: NetworkConfig, shape: Sequence[int], item_bytes: int, memory_mb: float) -> tuple[int, int]:
    """Slices of input that one slab of the early part and one of the heads may have.

    Args:
        config: shapes of the network.
        shape: (z, y, x) of the input.
        item_bytes: bytes of a number in the activations.
        memory_mb: bound on activations and results.

    Returns:
        Multiples of the strides, at least one stride each.
    """
    voxels = math.prod(shape)
    stored = sum(
        config.channels[i] * item_bytes / math.prod(config.stage_stride(i)) for i in range(config.early_stages)
    )
    results = (2 if config.semantic else 1) * config.head_channels * 2 / math.prod(config.fine_stride)
    slabs_mb = max(memory_mb - (stored + results) * voxels / 1e6, SMALLEST_SHARE * memory_mb)
    # The stem's grid is the widest: the first block of stage 1 still reads it.
    early_bytes = MAP_COPIES * config.channels[0] * item_bytes / config.stem_stride**3
    late_bytes = MAP_COPIES * config.head_channels * item_bytes / math.prod(config.fine_stride)
    plane = shape[1] * shape[2]
    early = int(slabs_mb * 1e6 / (plane * early_bytes)) - 2 * config.early_halo
    late = int(slabs_mb * 1e6 / (plane * late_bytes))
    return max(early, config.early_stride), max(late, config.stage_stride(2)[0])


def _early_in_slabs(
    network: UAENet,
    image: np.ndarray,
    device: torch.device,
    dtype: torch.dtype,
    slab: int,
    progress: Progress | None,
    cancel: Cancel | None,
) -> tuple[torch.Tensor, ...]:
    """Early maps (1, C, z, y, x) of the whole image."""
    import torch

    config = network.config
    stride, halo, depth = network.early_stride, network.early_halo, image.shape[0]
    slab = -(-slab // stride) * stride
    strides = [config.stage_stride(index)[0] for index in range(config.early_stages)]
    layout = torch.channels_last_3d if dtype != torch.float32 else torch.contiguous_format
    whole: list[torch.Tensor] = []
    for start in range(0, depth, slab):
        check_cancel(cancel)
        stop = min(start + slab, depth)
        low, high = max(start - halo, 0), min(stop + halo, depth)
        part = torch.from_numpy(np.ascontiguousarray(image[low:high], dtype=np.float32))[None, None]
        maps = network.early(part.to(device).contiguous(memory_format=layout))
        if start == 0 and stop == depth:
            return maps
        if not whole:
            whole = [
                torch.empty(
                    (1, m.shape[1], depth // s, *m.shape[3:]), dtype=m.dtype, device=device, memory_format=layout
                )
                for m, s in zip(maps, strides, strict=True)
            ]
        for target, found, step in zip(whole, maps, strides, strict=True):
            first = (start - low) // step
            target[:, :, start // step : stop // step] = found[:, :, first : first + (stop - start) // step]
        report(progress, STAGE, 0.6 * stop / depth)
    return tuple(whole)


def _head_in_slabs(head: PyramidHead, maps: Sequence[torch.Tensor], slab: int, cancel: Cancel | None) -> np.ndarray:
    """A pyramid head on the fine grid in slabs of fine cells, float16 (C, z, y, x).

    Borders and halo are multiples of the coarsest map's cells, so that nearest up-sampling picks the same cells as for
    the whole; the 3x3x3 output convolution needs one cell of halo and each smoothing pass one more.
    """
    depth = maps[0].shape[2]
    steps = [depth // part.shape[2] for part in maps]
    unit = steps[-1]
    slab = -(-slab // unit) * unit
    halo = -(-(1 + head.smoothing) // unit) * unit
    found = np.empty((head.output.out_channels, *maps[0].shape[2:]), dtype=np.float16)
    for start in range(0, depth, slab):
        check_cancel(cancel)
        stop = min(start + slab, depth)
        low, high = max(start - halo, 0), min(stop + halo, depth)
        part = head([m[:, :, low // step : high // step] for m, step in zip(maps, steps, strict=True)])
        found[:, start:stop] = _unit_half(part[:, :, start - low : stop - low]).cpu().numpy()[0]
    return found


def _unit_half(value: torch.Tensor) -> torch.Tensor:
    """Vectors (B, C, z, y, x) at unit length along C, normalised in fp32, stored in fp16."""
    import torch
    import torch.nn.functional as F

    return F.normalize(value.float(), dim=1).to(torch.float16)
