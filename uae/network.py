"""The embedding network: 3-D ResNet-18 with fine, coarse and semantic feature-pyramid heads.

One code for the papers' network (UAE, section "network"; layer table of the authors' code) and for the lighter
isotropic relatives that a CPU can train. Tensors are (batch, channel, z, y, x) on the 2 mm network grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uae.errors import ModelError

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class NetworkConfig:
    """Everything that decides the shapes of a network; stored with its weights.

    Attributes:
        stem: "conv" (3x7x7 at full resolution, the papers) or "space_to_depth" (2x2x2 voxels into 8 channels).
        channels: channels of the four stages.
        strides: stride (z, y, x) of the first block of each stage.
        z_kernels: kernel size along z of each stage's convolutions (1 or 3).
        pool_z: halve z by a max-pool after stage 1 (the papers).
        planar_stages: number of leading stages whose convolutions after the first strided one are planar (9 taps),
            the plane turning from one convolution to the next; a third of the work where cells are many.
        head_channels: length of each head's embedding.
        semantic: whether the semantic head exists.
        smooth_fine: passes of a (1, 2, 1) / 4 filter over the fine unit vectors at inference (our measurement on the
            validation CTs: 2 passes raise the matches within 10 mm from 42 to 47 %); the papers have none.
    """

    stem: str = "conv"
    channels: tuple[int, int, int, int] = (64, 128, 256, 512)
    strides: tuple[Triple, Triple, Triple, Triple] = ((1, 2, 2), (1, 2, 2), (1, 2, 2), (2, 2, 2))
    z_kernels: tuple[int, int, int, int] = (1, 1, 3, 3)
    pool_z: bool = True
    planar_stages: int = 0
    head_channels: int = 128
    semantic: bool = False
    smooth_fine: int = 0

    @classmethod
    def paper(cls, semantic: bool = True, width: int = 64, head_channels: int = 128) -> NetworkConfig:
        """The papers' network (authors' code): 33,333,184 parameters with the semantic head, 32,832,960 without."""
        return cls(channels=(width, 2 * width, 4 * width, 8 * width), head_channels=head_channels, semantic=semantic)

    @classmethod
    def light(cls, semantic: bool = False) -> NetworkConfig:
        """Isotropic strides 2/4/8/16 with 16 channels at half resolution: best of our pilots per CPU minute."""
        return cls(
            stem="space_to_depth",
            channels=(16, 64, 128, 256),
            strides=((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
            z_kernels=(3, 3, 3, 3),
            pool_z=False,
            planar_stages=2,
            head_channels=64,
            semantic=semantic,
            smooth_fine=2,
        )

    @property
    def stem_stride(self) -> int:
        """Input voxels per stem cell on every axis."""
        return 2 if self.stem == "space_to_depth" else 1

    def stage_stride(self, stage: int) -> Triple:
        """Cumulative stride (z, y, x) in network voxels of the output of `stage` (0..3), as the heads see it."""
        stride = [self.stem_stride] * 3
        for index in range(stage + 1):
            stride = [a * b for a, b in zip(stride, self.strides[index], strict=True)]
            if index == 0 and self.pool_z:
                stride[0] *= 2
        return (stride[0], stride[1], stride[2])

    def stage_kernels(self, stage: int) -> tuple[Triple, Triple, Triple, Triple]:
        """Kernels (z, y, x) of the four convolutions of `stage`."""
        full = (self.z_kernels[stage], 3, 3)
        if stage >= self.planar_stages:
            return (full, full, full, full)
        first = (1, 3, 3) if self.strides[stage] == (1, 1, 1) else full
        return (first, (3, 1, 3), (3, 3, 1), (1, 3, 3))

    @property
    def fine_stride(self) -> Triple:
        """Stride (z, y, x) of the fine and semantic heads in network voxels."""
        return self.stage_stride(0)

    @property
    def coarse_stride(self) -> Triple:
        """Stride (z, y, x) of the coarse head in network voxels; input sizes are padded to its multiples."""
        return self.stage_stride(3)

    @property
    def early_stages(self) -> int:
        """Number of stages that run in z-slabs: those whose z kernels need a halo of a few slices only."""
        return 2 if self.z_kernels[1] == 1 and self.strides[1][0] == 1 else 1

    @property
    def early_stride(self) -> int:
        """Input slices to whose multiples slab borders must be aligned."""
        return self.stage_stride(self.early_stages - 1)[0]

    @property
    def early_halo(self) -> int:
        """Input slices of real context each slab needs on both sides so that it equals one dense pass."""
        reach = 1 if self.stem == "conv" else self.stem_stride
        stride = self.stem_stride
        for stage in range(self.early_stages):
            step = self.strides[stage][0]
            if self.z_kernels[stage] == 3:
                reach += stride + 3 * stride * step
            stride *= step
            if stage == 0 and self.pool_z:
                stride *= 2
        return -(-reach // self.early_stride) * self.early_stride

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> NetworkConfig:
        """Inverse of to_dict.

        Raises:
            ModelError: a key is unknown or missing.
        """
        known = {field.name for field in fields(cls)}
        if set(values) - known:
            raise ModelError(f"unknown network setting {sorted(set(values) - known)}; the file is from a newer version")
        plain = {key: _tuples(value) for key, value in values.items()}
        return cls(**plain)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


class ConvNorm(nn.Module):
    """Convolution without bias, then BatchNorm (eps 1e-5, momentum 0.1 as the authors' code)."""

    def __init__(self, inputs: int, outputs: int, kernel: Triple, stride: Triple = (1, 1, 1)) -> None:
        super().__init__()
        padding = tuple(size // 2 for size in kernel)
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm3d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, z, y, x) -> (B, outputs, z', y', x')."""
        return self.bn(self.conv(x))


class BasicBlock(nn.Module):
    """Residual block of two convolutions; 1x1x1 strided projection on the shortcut of a stage's first block."""

    def __init__(
        self, inputs: int, outputs: int, kernels: tuple[Triple, Triple], stride: Triple, project: bool
    ) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inputs, outputs, kernels[0], stride)
        self.conv2 = ConvNorm(outputs, outputs, kernels[1])
        self.downsample = ConvNorm(inputs, outputs, (1, 1, 1), stride) if project else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, z, y, x) -> (B, outputs, z', y', x'); ReLU after the addition."""
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.conv2(F.relu(self.conv1(x))) + shortcut)


def space_to_depth(x: Tensor) -> Tensor:
    """(B, 1, z, y, x) -> (B, 8, z/2, y/2, x/2): each 2x2x2 block of voxels becomes 8 channels."""
    batch, _, depth, height, width = x.shape
    blocks = x.reshape(batch, depth // 2, 2, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 6, 1, 3, 5).reshape(batch, 8, depth // 2, height // 2, width // 2)


class Backbone(nn.Module):
    """Stem and four residual stages; tensor names follow the authors' released files."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        if config.stem == "conv":
            inputs = config.channels[0]
            self.conv1 = ConvNorm(1, inputs, (3, 7, 7))
        else:
            inputs = config.channels[0]
            self.conv1 = ConvNorm(8, inputs, (3, 3, 3))
        for stage, outputs in enumerate(config.channels):
            kernels = config.stage_kernels(stage)
            blocks = nn.Sequential(
                BasicBlock(inputs, outputs, (kernels[0], kernels[1]), config.strides[stage], project=True),
                BasicBlock(outputs, outputs, (kernels[2], kernels[3]), (1, 1, 1), project=False),
            )
            self.add_module(f"layer{stage + 1}", blocks)
            inputs = outputs

    def stem(self, x: Tensor) -> Tensor:
        """(B, 1, z, y, x) -> stem features."""
        return F.relu(self.conv1(space_to_depth(x) if self.config.stem == "space_to_depth" else x))

    def stage(self, index: int, x: Tensor) -> Tensor:
        """Run stage `index` (0..3); stage 0 ends with the z max-pool where the network has one."""
        x = getattr(self, f"layer{index + 1}")(x)
        if index == 0 and self.config.pool_z:
            x = F.max_pool3d(x, (2, 1, 1))
        return x


def smooth_vectors(vectors: Tensor, passes: int) -> Tensor:
    """Unit vectors of (B, C, z, y, x), `passes` times averaged (1, 2, 1) / 4 with their neighbours along z, y and x."""
    if passes == 0:
        return vectors
    vectors = F.normalize(vectors.float(), dim=1)
    for axis in (2, 3, 4):
        last = vectors.shape[axis] - 1
        for _ in range(passes):
            low = torch.cat([vectors.narrow(axis, 0, 1), vectors.narrow(axis, 0, last)], axis)
            high = torch.cat([vectors.narrow(axis, 1, last), vectors.narrow(axis, last, 1)], axis)
            vectors = 0.5 * vectors + 0.25 * (low + high)
    return vectors


class PyramidHead(nn.Module):
    """Feature pyramid: 1x1x1 laterals, nearest up-sampling and addition, one 3x3x3 convolution on the finest map."""

    def __init__(self, inputs: Sequence[int], channels: int, smoothing: int = 0) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.lateral = nn.ModuleList(nn.Conv3d(count, channels, 1) for count in inputs)
        self.output = nn.Conv3d(channels, channels, 3, padding=1)

    def pyramid(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps, finest first, each (B, C_i, z, y, x) -> the summed finest map before the output convolution."""
        merged = self.lateral[-1](maps[-1])
        for lateral, finer in zip(reversed(self.lateral[:-1]), reversed(maps[:-1]), strict=True):
            merged = lateral(finer) + F.interpolate(merged, size=finer.shape[2:], mode="nearest")
        return merged

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps, finest first -> (B, channels, z, y, x), not normalised."""
        return smooth_vectors(self.output(self.pyramid(maps)), self.smoothing)


class UAENet(nn.Module):
    """Backbone with fine (stages 1-3), coarse (stage 4) and, where configured, semantic (stages 1-3) heads."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.fine = PyramidHead(config.channels[:3], config.head_channels, config.smooth_fine)
        self.coarse = PyramidHead(config.channels[3:], config.head_channels)
        self.semantic = PyramidHead(config.channels[:3], config.head_channels) if config.semantic else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming for the backbone, Xavier-uniform for the heads (authors' code without ImageNet weights)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv3d):
                if name.startswith("backbone"):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                else:
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)

    @property
    def early_halo(self) -> int:
        """See NetworkConfig.early_halo."""
        return self.config.early_halo

    @property
    def early_stride(self) -> int:
        """See NetworkConfig.early_stride."""
        return self.config.early_stride

    def early(self, x: Tensor) -> tuple[Tensor, ...]:
        """Stem and the stages that may run in z-slabs: (B, 1, z, y, x) -> their maps, finest first."""
        maps = []
        x = self.backbone.stem(x)
        for index in range(self.config.early_stages):
            x = self.backbone.stage(index, x)
            maps.append(x)
        return tuple(maps)

    def stages(self, early: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """All four stage maps, finest first, from the early ones."""
        maps = list(early)
        for index in range(self.config.early_stages, 4):
            maps.append(self.backbone.stage(index, maps[-1]))
        return tuple(maps)

    def late(self, early: Sequence[Tensor]) -> dict[str, Tensor]:
        """The remaining stages and the heads: early maps -> unit embeddings by head, each (B, C, z, y, x)."""
        maps = self.stages(early)
        heads = {"fine": self.fine(maps[:3]), "coarse": self.coarse(maps[3:])}
        if self.semantic is not None:
            heads["semantic"] = self.semantic(maps[:3])
        return {name: F.normalize(value, dim=1) for name, value in heads.items()}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """One dense pass.

        Args:
            x: (B, 1, z, y, x), sizes multiples of the coarse stride.

        Returns:
            Unit vectors along channels: "fine" at stride 2, "coarse" at the coarse stride, "semantic" where present.
        """
        return self.late(self.early(x))


def parameter_count(network: nn.Module) -> int:
    """Number of trainable values."""
    return sum(parameter.numel() for parameter in network.parameters())
