"""Body outline, walls, cavities, lungs and the muscles of the canonical body (coordinates as in skeleton.py)."""

from __future__ import annotations

from functools import cache

import numpy as np

from uae.phantom.canvas import Canvas, Ellipsoid, Hull, Tube, paint_union, rotation, smooth_path
from uae.phantom.skeleton import RIB_CAGE, SIGN, spine_y
from uae.phantom.tissues import LABEL, SIDES, TISSUE

OUTLINE = Hull([
    (-260, 178, -88, 96), (-200, 178, -92, 100), (-140, 180, -104, 116), (-100, 181, -110, 120), (-50, 178, -113, 116),
    (0, 170, -112, 108), (60, 158, -111, 99), (120, 154, -112, 100), (180, 158, -115, 107), (250, 163, -119, 114),
    (320, 168, -116, 121), (360, 178, -101, 121), (390, 186, -82, 115), (408, 180, -70, 108), (424, 150, -58, 98),
    (440, 105, -50, 84), (458, 70, -46, 74), (478, 61, -45, 69), (520, 62, -48, 70),
])  # fmt: skip
"""Skin surface: z, half-width, front y, back y (mm)."""

SKIN_MM = 2.2
CROTCH_Z = -146.0
LEG = (90.5, 4.0, 89.5, 98.0)
"""Thigh: centre x, centre y, half-width, half-depth, mm."""

DOMES = {"left": (72.0, 4.0, 243.0), "right": (-66.0, -2.0, 256.0)}
"""Top of each half of the diaphragm: x, y, z, mm."""


def outline_depth(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Depth under the skin, mm (negative outside)."""
    trunk = np.minimum(OUTLINE.depth(x, y, z), (z - CROTCH_Z) * 1.2)
    dx, dy = np.abs(x) - LEG[0], y - LEG[1]
    length = np.sqrt((dx / LEG[2]) ** 2 + (dy / LEG[3]) ** 2)
    leg = np.where(z < -60.0, (1.0 - length) * LEG[2], -50.0)
    return np.maximum(trunk, leg)


def fat_thickness(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Subcutaneous fat of the canonical body, mm: thicker on buttocks, hips and the front of the belly."""
    base = np.interp(z, [-220, -100, 0, 100, 250, 350, 425, 470], [12, 17, 14, 10, 8, 7, 8, 6]).astype(np.float32)
    belly = np.exp(-(((z - 40.0) / 70.0) ** 2))
    seat = np.exp(-(((z + 75.0) / 55.0) ** 2))
    front = np.clip(-y / 100.0, 0.0, 1.0)
    return base + 4.0 * belly * front + 9.0 * seat * np.clip(y / 100.0, 0.0, 1.0) + 3.0 * seat * np.abs(x) / 180.0


def diaphragm_z(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Height of the diaphragm's upper surface, mm."""
    heights = []
    for side, (cx, cy, top) in DOMES.items():
        out = (x - cx) * SIGN[side]
        lateral = np.where(out > 0, out / 62.0, out / 150.0)
        behind = np.where(y > cy, (y - cy) / 78.0, (y - cy) / 115.0)
        heights.append(top - 78.0 * lateral**2 - 82.0 * behind**2)
    return np.maximum(np.maximum(*heights), 96.0)


def mediastinum_half_width(y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Half-width of the space between the lungs, mm."""
    at_y = np.interp(y, [-100, -75, -45, -10, 25, 55, 80, 100], [7, 6, 12, 22, 22, 20, 24, 31]).astype(np.float32)
    return at_y * np.interp(z, [230, 300, 370, 400, 430], [1.1, 1.0, 1.05, 1.2, 1.6]).astype(np.float32)


def paint_trunk(canvas: Canvas) -> None:
    """Skin, subcutaneous fat, muscle wall, the fat of the body cavities and the diaphragm."""
    everything = canvas.select((-1e4, -1e4, -1e4), (1e4, 1e4, 1e4))
    x, y, z = canvas.at(everything)
    depth = outline_depth(x, y, z)
    canvas.paint(everything, depth > 0, "skin", "skin")
    canvas.paint(everything, depth > SKIN_MM, "subcutaneous_fat", "fat")
    wall = depth > SKIN_MM + fat_thickness(x, y, z)
    # Fat between the buttocks and between the thighs.
    wall &= ~((np.abs(x) < np.interp(z, [-150, -60, -30], [7, 5, 0])) & (y > 78) & (z < -30))
    canvas.paint(everything, wall, "muscle_wall", "muscle")
    inside = canvas.select((-145, -105, -140), (145, 100, 436))
    if inside is None:
        return
    x, y, z = canvas.at(inside)
    cavity = RIB_CAGE.depth(x, y, z)
    cavity = np.where((z > -138) & (z < 436), cavity, -1.0)
    above = z - diaphragm_z(x, y)
    canvas.paint(inside, (cavity > 7) & (above <= 0), "visceral_fat", "visceral_fat")
    canvas.paint(inside, (cavity > 7) & (above > 0), "mediastinal_fat", "visceral_fat")
    canvas.paint(inside, (cavity > 7) & (above > -3.5) & (above <= 0), "diaphragm", "muscle")
    lateral = np.abs(x - 6.0 * np.clip((320.0 - z) / 80.0, 0.0, 1.0)) - mediastinum_half_width(y, z)
    lung = np.minimum(np.minimum(cavity - 9.0, above), lateral)
    lung = np.where((z > 130) & (z < 431), lung, -1.0)
    for side, s in SIGN.items():
        canvas.paint(inside, (lung > 0) & (x * s > 0), f"lung_{side}", "lung")


def _grow(
    rng: np.random.Generator, start: np.ndarray, heading: np.ndarray, radius: float, length: float, deep: int
) -> list:
    """A random branching tree of tubes, fixed in the canonical body."""
    bend = heading + rng.normal(0.0, 0.22, 3)
    middle = start + 0.55 * length * heading
    end = middle + 0.45 * length * bend / np.linalg.norm(bend)
    tubes = [Tube(np.array([start, middle, end]), np.array([radius, 0.9 * radius, 0.8 * radius]))]
    if deep > 0:
        side = np.cross(bend, rng.normal(0.0, 1.0, 3))
        side /= np.linalg.norm(side) + 1e-9
        for sign, share in ((1.0, rng.uniform(0.45, 0.8)), (-1.0, rng.uniform(0.35, 0.65))):
            new = bend / np.linalg.norm(bend) + sign * share * side
            tubes += _grow(rng, end, new / np.linalg.norm(new), 0.76 * radius, 0.82 * length, deep - 1)
    return tubes


@cache
def lung_vessels() -> list[tuple[str, Tube]]:
    """(side, tube) of the pulmonary vessels, the same in every body."""
    rng = np.random.default_rng(20240801)
    found = []
    for side, s in SIGN.items():
        hilum = np.array([s * 34.0, 14.0, 332.0])
        for goal in (
            (95, -45, 375),
            (80, 40, 385),
            (105, 10, 335),
            (85, -60, 300),
            (95, 45, 280),
            (75, 55, 235),
            (100, -5, 265),
        ):
            heading = np.array([s * goal[0], goal[1], goal[2]]) - hilum
            length = np.linalg.norm(heading)
            found += [(side, tube) for tube in _grow(rng, hilum, heading / length, 5.0, 0.36 * length, 5)]
    return found


LIVER_VESSELS = (
    ([(-22, 8, 236), (-45, 2, 226), (-75, -5, 205), (-95, -5, 180)], [6, 5, 4, 2.5]),
    ([(-22, 6, 238), (-40, -20, 222), (-58, -45, 200)], [5.5, 4.5, 2.5]),
    ([(-20, 2, 238), (-5, -30, 226), (20, -52, 216)], [5.5, 4, 2.5]),
    ([(-18, -12, 168), (-40, -12, 180), (-72, 8, 192), (-98, 28, 200)], [6.5, 6.5, 4.5, 2.5]),
    ([(-45, -12, 182), (-78, -30, 176), (-98, -35, 165)], [5.5, 4, 2.5]),
    ([(-38, -14, 180), (-8, -42, 205), (22, -60, 205)], [5.5, 4.5, 2.5]),
    ([(-66, 4, 190), (-85, 35, 165), (-95, 40, 140)], [4.5, 3.5, 2]),
)
"""Hepatic veins and portal branches: centre lines and radii, mm."""


def paint_lung_vessels(canvas: Canvas) -> None:
    """Pulmonary vessels inside the lungs (they keep the lungs' labels, as usual in organ labels)."""
    for side in SIDES:
        tubes = [tube for where, tube in lung_vessels() if where == side]
        paint_union(canvas, tubes, [(0.0, "", "lung_vessel")], only=(f"lung_{side}",))


def paint_muscles(canvas: Canvas) -> None:
    """Psoas, quadratus (muscle wall), erector spinae and gluteal muscles, and fat planes of the wall."""
    psoas = Tube.through(
        [(26, 34, 160), (36, 32, 110), (45, 24, 55), (58, 4, -5), (82, -28, -55), (98, -30, -95), (108, -8, -125)],
        [7, 14, 19, 19, 16, 14, 10],
    )
    iliacus = Tube.through(
        [(108, 10, 30), (98, -10, 0), (96, -38, -45), (104, -34, -85)], [9, 15, 14, 8], 8.0, (0.8, 1.5, 1.0)
    )
    quadratus = Tube.through([(62, 62, 150), (74, 58, 100), (84, 50, 45)], [8, 11, 13], 8.0, (1.5, 1.0, 1.0))
    heights = np.array([-40.0, 0, 54, 110, 156, 215, 288, 353, 410, 450])
    behind = [26, 31, 34, 36, 37, 36, 31, 29, 25, 20]
    out = [20, 30, 35, 35, 33, 30, 26, 24, 20, 16]
    girth = [9, 17, 20, 20, 19, 16, 13, 11, 12, 10]
    erector = Tube.through(
        [(o, float(spine_y(h)) + b + 6, h) for o, b, h in zip(out, behind, heights)], girth, 10.0, (1.35, 0.85, 1)
    )
    gluteus = Ellipsoid((72, 76, -72), (58, 30, 80), rotation(0, 18, -18))
    medius = Ellipsoid((136, 12, -28), (22, 58, 66), rotation(0, 0, 20))
    for side, s in SIGN.items():
        psoas.mirrored(s).paint(canvas, [(0.0, f"psoas_{side}", "muscle")], only=("visceral_fat", "muscle_wall"))
        iliacus.mirrored(s).paint(canvas, [(0.0, "muscle_wall", "muscle")], only=("visceral_fat",))
        quadratus.mirrored(s).paint(canvas, [(0.0, "muscle_wall", "muscle")], only=("visceral_fat",))
        wall = ("muscle_wall", "visceral_fat", "mediastinal_fat")
        erector.mirrored(s).paint(
            canvas, [(-1.4, "muscle_wall", "fat"), (0.0, f"erector_spinae_{side}", "muscle")], only=wall
        )
        for shape in (gluteus, medius):
            shape.mirrored(s).paint(
                canvas,
                [(-1.5, "muscle_wall", "fat"), (0.0, f"gluteus_{side}", "muscle")],
                only=("muscle_wall", f"gluteus_{side}"),
            )
        _paint_wall_planes(canvas, s)


def _network(points: np.ndarray, seed: int, wavelengths: tuple[float, float]) -> np.ndarray:
    """A smooth random function of canonical points (3, N) with unit spread, the same in every body."""
    rng = np.random.default_rng(seed)
    lengths = rng.uniform(*wavelengths, 7)
    waves = rng.normal(size=(7, 3))
    waves *= (2 * np.pi / lengths / np.linalg.norm(waves, axis=1))[:, None]
    phases = rng.uniform(0, 2 * np.pi, 7)
    out = np.zeros(points.shape[1], np.float32)
    for wave, phase in zip(waves.astype(np.float32), phases.astype(np.float32)):
        out += np.sin(wave @ points + phase)
    return out * np.float32(np.sqrt(2 / 7))


def paint_fine_structure(canvas: Canvas) -> None:
    """Septa of fat between muscles, and small vessels in visceral fat, lungs and liver.

    The zero surface of a smooth random function is a system of sheets; where two of them cross is a net of lines.
    """
    for names, tissue, wavelengths, width in (
        (("muscle_wall",), "fat", (38.0, 75.0), None),
        (("gluteus_left", "gluteus_right", "erector_spinae_left", "erector_spinae_right"), "fat", (30.0, 50.0), None),
        (("visceral_fat",), "venous", (26.0, 44.0), 0.32),
        (("lung_left", "lung_right"), "lung_vessel", (18.0, 32.0), 0.30),
        (("liver",), "liver_vessel", (30.0, 46.0), 0.22),
        (("spleen", "mediastinal_fat"), "venous", (26.0, 40.0), 0.2),
    ):
        found = np.isin(canvas.labels, [LABEL[name] for name in names])
        if not found.any():
            continue
        points = np.stack([canvas.x[found], canvas.y[found], canvas.z[found]])
        first = np.abs(_network(points, 11, wavelengths))
        if width is None:
            # Sheets of some 2 mm that come and go.
            paint = first < 0.11 * np.clip(1.0 + _network(points, 13, (90.0, 160.0)), 0.0, 1.6)
        else:
            paint = np.hypot(first, _network(points, 12, wavelengths)) < width
        tissues = canvas.tissues[found]
        tissues[paint & (tissues == (TISSUE["muscle"] if width is None else tissues))] = TISSUE[tissue]
        canvas.tissues[found] = tissues


def _paint_wall_planes(canvas: Canvas, s: int) -> None:
    """Fat between the layers of the wall: armpit, groin, thigh compartments, under the shoulder blade."""
    planes = (
        ([(118, -30, 395), (132, -22, 360), (142, 5, 325), (146, 20, 280)], [14, 12, 8, 4]),
        ([(70, -78, -70), (85, -62, -110), (92, -55, -160), (90, -50, -230)], [5, 9, 7, 5]),
        ([(60, 62, -150), (72, 58, -180), (80, 48, -240)], [6, 8, 8]),
        ([(120, 80, 300), (112, 92, 345), (104, 92, 385)], [3, 4, 4]),
        ([(40, 60, -135), (45, 72, -110), (40, 70, -85)], [12, 13, 9]),
    )
    for points, radii in planes:
        line, girth = smooth_path(points, radii, 9.0)
        Tube(line, girth).mirrored(s).paint(canvas, [(0.0, "", "fat")], only=("muscle_wall",))
