"""Level lists of DEEDS, each with its source."""

from __future__ import annotations

import math
from dataclasses import dataclass

from uae.errors import InputError


@dataclass(frozen=True)
class Level:
    """One level of the dense displacement search; every length in voxels of the working grid.

    Attributes:
        step: distance of the control points, and side of the block each of them owns.
        radius: search radius in quantisation steps; (2 radius + 1)^3 displacements are tried.
        quantisation: length of one quantisation step.
    """

    step: int
    radius: int
    quantisation: int

    @property
    def mind_step(self) -> int:
        """Neighbour distance and patch half-width of MIND-SSC (authors' code: floor(quantisation / 2 + 1))."""
        return math.floor(0.5 * self.quantisation + 1)

    @property
    def side(self) -> int:
        """Tried displacements along one axis."""
        return 2 * self.radius + 1

    @property
    def labels(self) -> int:
        """Tried displacements in all."""
        return self.side**3

    @property
    def reach(self) -> int:
        """Largest tried displacement along one axis."""
        return self.radius * self.quantisation


@dataclass(frozen=True)
class Preset:
    """A complete setting of `uae.deeds.register`.

    Attributes:
        name: the word the user gives.
        levels: coarse to fine.
        source: where the numbers come from.
        alpha: divides the data cost; larger means smoother.
        sampling: 'original' (every second voxel along two axes where step > 4) or 'stride2' (along all three axes,
            and every second voxel in a checkerboard where step is 4).
        border: 'neutral' (a descriptor of medium similarity outside the field of view) or 'edge' (replication).
        alignment: 'centre' (a control point lies in the middle of its block) or 'corner' (as the original).
        polish: rounds of the sub-voxel end (uae.deeds.polish); 0 ends with the labels, as the original.
        bending: weight of the bending energy in it.
    """

    name: str
    levels: tuple[Level, ...]
    source: str
    alpha: float = 1.6
    sampling: str = "stride2"
    border: str = "neutral"
    alignment: str = "centre"
    polish: int = 2
    bending: float = 0.2

    def __post_init__(self) -> None:
        """Refuse settings no solver step could use."""
        if not self.levels:
            raise InputError(f"DEEDS preset {self.name!r} has no level; give at least one")
        for level in self.levels:
            if min(level.step, level.radius, level.quantisation) < 1 or level.step > 64:
                raise InputError(f"DEEDS level {level} is unusable; step (1..64), radius and quantisation are >= 1")
        allowed = (
            ("sampling", ("original", "stride2")),
            ("border", ("neutral", "edge")),
            ("alignment", ("centre", "corner")),
        )
        for key, words in allowed:
            if getattr(self, key) not in words:
                raise InputError(f"DEEDS {key} {getattr(self, key)!r} is unknown; use one of {', '.join(words)}")


def make_levels(steps: tuple[int, ...], radii: tuple[int, ...], quantisations: tuple[int, ...]) -> tuple[Level, ...]:
    """Levels from the three lists -G, -L and -Q of deedsBCV; they must be equally long."""
    if not len(steps) == len(radii) == len(quantisations):
        raise InputError("DEEDS needs equally many grid steps, search radii and quantisations")
    return tuple(Level(*values) for values in zip(steps, radii, quantisations))


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "faithful",
            make_levels((8, 7, 6, 5, 4), (8, 7, 6, 5, 4), (5, 4, 3, 2, 1)),
            "defaults of deedsBCV (Heinrich et al., VISCERAL 2015), its sampling, borders and corner alignment",
            sampling="original",
            border="edge",
            alignment="corner",
            polish=0,
        ),
        Preset(
            "default",
            make_levels((8, 7, 6, 5, 4), (6, 5, 4, 3, 2), (5, 4, 3, 2, 1)),
            "deedsBCV's fast variant (README: -L 6x5x4x3x2); neutral borders, stride-2 sampling: our measurement",
        ),
        Preset(
            "after-rigid",
            make_levels((8, 7, 6, 5, 4), (4, 4, 3, 3, 2), (3, 2, 2, 1, 1)),
            "our measurement, after a refined rigid: reach 24 mm at 2 mm voxels and a smoother field keep flat, noisy "
            "tissue in its place (TRE 2.8 -> 1.1 mm on the demo pair, 4.5 -> 2.4 mm on a hard simulated MR)",
            alpha=8.0,
        ),
        Preset(
            "large-motion",
            make_levels((8, 7, 6, 5, 4), (8, 7, 6, 5, 4), (5, 4, 3, 2, 1)),
            "deedsBCV's default search (reach 40 voxels); neutral borders, stride-2 sampling: our measurement",
        ),
        Preset(
            "crosssam",
            make_levels((6, 5, 4, 3), (6, 5, 4, 3), (3, 2, 2, 1)),
            "call of CrossSAM (-l 4 -G 6x5x4x3 -L 6x5x4x3 -Q 3x2x2x1; authors' code); neutral borders: our measurement",
            sampling="original",
        ),
    )
}


def find_preset(preset: str | Preset) -> Preset:
    """The preset of that name (or the given one).

    Raises:
        InputError: no preset has that name.
    """
    if isinstance(preset, Preset):
        return preset
    if preset not in PRESETS:
        raise InputError(f"unknown DEEDS preset {preset!r}; use one of {', '.join(PRESETS)}")
    return PRESETS[preset]
