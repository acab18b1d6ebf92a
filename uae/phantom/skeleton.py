"""Bones of the canonical body: where the vertebrae and ribs are, and how they are painted.

Canonical space: millimetres, x to the left, y to the back, z up; z = 0 at the top of the sacrum, y = 0 mid-depth.
Sizes follow anatomical textbooks' averages for an adult of about 1.75 m.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.interpolate import PchipInterpolator

from uae.phantom.canvas import Canvas, Ellipsoid, Hull, Sheet, Tube, paint_union, rotation
from uae.phantom.tissues import SIDES, VERTEBRAE

SIGN = {"left": 1, "right": -1}
CORTEX_MM = 1.6

# Surface through the middle of the ribs, and the wall of the abdominal cavity below: z, half-width, front y, back y.
RIB_CAGE = Hull([
    (-145, 24, -10, 50), (-125, 38, -45, 62), (-100, 46, -74, 72), (-60, 64, -84, 78), (-25, 92, -92, 80),
    (10, 116, -95, 76), (50, 124, -95, 70), (100, 128, -95, 74), (150, 134, -98, 80), (200, 138, -99, 86),
    (250, 138, -99, 92), (300, 134, -93, 96), (340, 125, -80, 95), (375, 108, -62, 90), (400, 86, -44, 82),
    (420, 60, -20, 70), (436, 26, 10, 56),
])  # fmt: skip

_LEVELS = {
    "T1": 427, "T2": 410, "T3": 392, "T4": 373, "T5": 353, "T6": 332, "T7": 310, "T8": 288, "T9": 265, "T10": 241,
    "T11": 215, "T12": 187, "L1": 156, "L2": 123, "L3": 89, "L4": 54, "L5": 19,
}  # fmt: skip
_CURVE = PchipInterpolator(
    [-15, 19, 54, 89, 123, 156, 187, 241, 310, 353, 390, 427, 445, 480],
    [42, 29, 22, 20, 24, 30, 37, 49, 56, 52, 42, 27, 18, 8],
)


def spine_y(z: float | np.ndarray) -> np.ndarray:
    """Position y of the line through the vertebral bodies at height z, mm."""
    return _CURVE(np.clip(z, -15, 480))


VERTEBRA_CENTERS = {name: np.array([0.0, float(spine_y(z)), float(z)]) for name, z in _LEVELS.items()}
"""Centres of the vertebral bodies, canonical mm."""

RIB_DROP = (30, 45, 58, 68, 76, 84, 90, 92, 90, 84, 65, 40)
RIB_END_DEG = (150, 152, 153, 153, 151, 147, 141, 133, 125, 117, 95, 68)
HIP_CENTER = np.array([90.0, -8.0, -84.0])
STERNUM = ((0, -59, 402), (0, -72, 372), (0, -84, 332), (0, -94, 285), (0, -97, 252), (0, -95, 234))


def vertebra_size(name: str) -> tuple[float, float, float]:
    """Half-width, half-depth and half-height (mm) of a vertebral body."""
    k = VERTEBRAE.index(name) / (len(VERTEBRAE) - 1)
    at = [0.0, 0.35, 0.7, 1.0]
    width, depth = np.interp(k, at, [14, 14.5, 20, 25]), np.interp(k, at, [8.5, 12.5, 15, 17.5])
    z = _LEVELS[name]
    nodes = sorted([*_LEVELS.values(), -17])
    below = nodes[nodes.index(z) - 1]
    disc = 4.0 if name.startswith("T") else 9.0
    return float(width), float(depth), 0.5 * (z - below - disc)


def spine_frame(z: float) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors along the spine (up) and towards the back at height z, each (3,)."""
    slope = float(spine_y(z + 4) - spine_y(z - 4)) / 8.0
    up = np.array([0.0, slope, 1.0]) / np.hypot(1.0, slope)
    return up, np.array([0.0, up[2], -up[1]])


def rib_points(number: int) -> np.ndarray:
    """Centre line of the left rib `number` (1..12), from its head to its front end, (K, 3) canonical mm."""
    name = f"T{number}"
    width, depth, _ = vertebra_size(name)
    center = VERTEBRA_CENTERS[name]
    drop, end = RIB_DROP[number - 1], RIB_END_DEG[number - 1]
    start = 30.0 if number > 1 else 40.0
    points = [np.add(center, (width + 2.0, 0.45 * depth, 5.0))]
    for angle in np.linspace(start, end, 9):
        share = (angle - start) / (end - start)
        points.append(RIB_CAGE.point(angle, center[2] + 2.0 - drop * share**1.25))
    return np.array(points)


def _paint_bone(
    canvas: Canvas, shapes: Sequence, structure: str, cortex: float = CORTEX_MM, inside: str = "marrow"
) -> None:
    paint_union(canvas, shapes, [(0.0, structure, "cortical"), (cortex, structure, inside)])


def paint_ribs(canvas: Canvas) -> None:
    """Twelve pairs of ribs and the costal cartilages that join the first ten to the sternum."""
    sternum = Tube.through(STERNUM, [9, 7, 6, 6, 5, 3.5]).vertices
    ends = {n: rib_points(n)[-1] for n in range(1, 13)}
    for side in SIDES:
        for number in range(1, 11):
            end = ends[number]
            if number <= 7:
                height = np.interp(number, [1, 2, 7], [392, 374, 248])
                k = int(np.argmin(np.abs(sternum[:, 2] - height)))
                goal = sternum[k] + [14.0, 1.0, 0.0]
            else:
                goal = 0.45 * ends[number - 1] + 0.55 * np.array([22.0, -97.0, ends[number - 1][2] + 30.0])
            middle = 0.5 * (end + goal) + [0.0, -4.0, -0.08 * np.linalg.norm(goal - end)]
            Tube.through([end, middle, goal], [5.5, 5.0, 4.5], 10.0).mirrored(SIGN[side]).paint(
                canvas, [(0.0, "costal_cartilage", "cartilage")])  # fmt: skip
        for number in range(1, 13):
            radius = 5.6 if number < 11 else 4.6
            tube = Tube.through(rib_points(number), [4.5, *([radius] * 9)], 10.0, (1.0, 0.9, 1.25))
            _paint_bone(canvas, [tube.mirrored(SIGN[side])], f"rib_{side}_{number}", 1.5)


def _paint_body(canvas: Canvas, center, size, structure: str, tissue: str, cortex: float) -> None:
    """An elliptic cylinder with a slight waist along the spine."""
    width, depth, height = size
    up, back = spine_frame(center[2])
    reach = np.array([width, depth + height * abs(up[1]) + 2, height + depth * abs(up[1]) + 2])
    selection = canvas.select(center - reach, center + reach)
    if selection is None:
        return
    x, y, z = canvas.at(selection)
    dy, dz = y - float(center[1]), z - float(center[2])
    along = dy * float(up[1]) + dz * float(up[2])
    behind = dy * float(back[1]) + dz * float(back[2])
    waist = 1.0 - (0.10 if cortex > 0 else 0.0) * (1.0 - np.minimum((along / height) ** 2, 1.0))
    radial = np.sqrt((x / width) ** 2 + (behind / depth) ** 2) / waist
    # A flat back side, where the canal lies.
    inside = np.minimum((1.0 - radial) * depth, height - np.abs(along))
    inside = np.minimum(inside, 0.86 * depth - behind)
    if cortex > 0:
        canvas.paint(selection, inside > 0, structure, "cortical")
        canvas.paint(selection, inside > cortex, structure, tissue)
    else:
        canvas.paint(selection, inside > 0, structure, tissue)


def paint_vertebra(canvas: Canvas, center: np.ndarray, size, structure: str, thoracic: float) -> None:
    """Body, pedicles, laminae, transverse and spinous processes; `thoracic` 0..1 slants the processes."""
    width, depth, height = size
    up, back = spine_frame(center[2])
    side = np.array([1.0, 0.0, 0.0])

    def local(a: float, b: float, c: float) -> np.ndarray:
        return center + a * side + b * back + c * up

    ring = depth * 0.86 + 9.0
    arms = []
    for s in (1, -1):
        pedicle, corner = local(s * 0.62 * width, 0.6 * depth, 3), local(s * 13.5, ring + 1, 1)
        lamina, knob = local(0, ring + 11, -5), local(s * (13 + 0.9 * width), ring + 5 + 6 * thoracic, 2 + 4 * thoracic)
        arms.append(Tube(np.array([pedicle, corner, lamina]), np.array([5.0, 5.0, 4.0]), (1, 1, 1.35)))
        arms.append(Tube(np.array([corner, knob]), np.array([5.0, 3.5]), (1, 1, 1.2)))
        arms.append(Tube(np.array([local(s * 13, ring + 2, -0.9 * height), local(s * 13, ring + 2, 0.9 * height)]),
                         np.array([4.5, 4.5])))  # fmt: skip
    length = 17.0 + 8.0 * (1 - thoracic)
    tip = local(0, ring + 11 + length, -6 - 16 * thoracic)
    arms.append(Tube(np.array([local(0, ring + 11, -4), tip]), np.array([3.6, 4.2]), (0.8, 1.0, 1.7)))
    _paint_bone(canvas, arms, structure, 1.5)
    _paint_body(canvas, center, size, structure, "marrow", 1.3)


def paint_spine(canvas: Canvas) -> None:
    """Cervical remainder, T1..L5, discs, sacrum, canal with fluid, and cord."""
    for z in (443.5, 459.0, 474.0, 490.0):
        size = (12.0, 8.0, 5.8)
        paint_vertebra(canvas, np.array([0.0, float(spine_y(z)), z]), size, "cervical_vertebrae", 0.3)
    for name, center in VERTEBRA_CENTERS.items():
        thoracic = float(np.interp(center[2], [150, 260, 380, 430], [0.0, 1.0, 1.0, 0.4]))
        paint_vertebra(canvas, center, vertebra_size(name), f"vertebra_{name}", thoracic)
    for name, center in VERTEBRA_CENTERS.items():
        width, depth, height = vertebra_size(name)
        up, _ = spine_frame(center[2])
        disc = 4.0 if name.startswith("T") else 9.0
        _paint_body(
            canvas,
            center - (height + disc / 2) * up,
            (0.97 * width, 0.97 * depth, disc / 2 + 0.3),
            "discs",
            "disc",
            0.0,
        )
    _paint_sacrum(canvas)
    heights = np.arange(-60.0, 500.0, 12.0)
    line = []
    for z in heights:
        depth = np.interp(z, [0, 160, 310, 427], [16, 14, 12, 8])
        line.append([0.0, float(spine_y(z)) + 0.86 * depth + 8.5 if z > -5 else 58.0 + 0.45 * (-5 - z), z])
    line = np.array(line)
    canal = Tube(line, np.full(len(line), 8.2), (1.2, 1.0, 1.0))
    canal.paint(canvas, [(0.0, "spinal_canal", "visceral_fat"), (1.2, "spinal_canal", "csf")])
    keep = line[:, 2] > 145
    Tube(line[keep], np.full(int(keep.sum()), 4.6), (1.3, 1.0, 1.0)).paint(canvas, [(0.0, "spinal_cord", "cord")])


def _paint_sacrum(canvas: Canvas) -> None:
    points = [(0, 44, -12), (0, 57, -35), (0, 72, -60), (0, 78, -85), (0, 70, -108), (0, 60, -122)]
    core = Tube.through(points, [17, 14, 11, 8, 5, 3], 8.0, (2.1, 1.0, 1.0))
    wing = Ellipsoid((36, 56, -22), (24, 17, 26), rotation(-20, 0, 18))
    _paint_bone(canvas, (core, wing, wing.mirrored(-1)), "sacrum")


def paint_chest_bones(canvas: Canvas) -> None:
    """Sternum, clavicles, shoulder blades and the heads of the humeri."""
    sternum = Tube.through(STERNUM, [7.5, 6.5, 5.5, 5.5, 4.5, 3.0], 8.0, (3.4, 1.0, 1.0))
    _paint_bone(canvas, [sternum], "sternum", 1.3)
    blade = Sheet(np.array([
        [(62, 88, 392), (68, 99, 370), (74, 106, 330), (84, 106, 285)],
        [(95, 88, 398), (96, 97, 370), (96, 103, 330), (90, 106, 285)],
        [(126, 58, 396), (122, 74, 370), (112, 95, 330), (96, 105, 285)],
    ]), 3.6)  # fmt: skip
    spine = Tube.through([(70, 102, 378), (100, 100, 388), (130, 78, 404), (150, 45, 416)], [4, 5, 6, 7])
    glenoid = Ellipsoid((130, 45, 388), (9, 14, 18), rotation(0, 0, 30))
    head = Ellipsoid((150, 25, 390), (23, 23, 24))
    clavicle = Tube.through([(17, -60, 404), (50, -58, 414), (95, -25, 420), (140, 22, 422)], [8, 6, 6, 7])
    for side, s in SIGN.items():
        _paint_bone(canvas, [shape.mirrored(s) for shape in (blade, spine, glenoid)], f"scapula_{side}")
        _paint_bone(canvas, [head.mirrored(s)], f"humerus_{side}", inside="fatty_marrow")
        _paint_bone(canvas, [clavicle.mirrored(s)], f"clavicle_{side}")


def paint_pelvis_bones(canvas: Canvas) -> None:
    """Hip bones (wing, acetabulum, pubis, ischium) and the upper femora."""
    wing = Sheet(np.array([
        [(112, -72, 2), (132, -45, 34), (135, 0, 52), (108, 45, 42), (62, 82, 8), (50, 88, -18)],
        [(108, -62, -18), (118, -35, -2), (116, 5, 12), (96, 42, 8), (62, 75, -12), (54, 82, -30)],
        [(100, -48, -40), (98, -25, -45), (93, 5, -45), (85, 35, -38), (66, 62, -38), (60, 72, -42)],
    ]), 5.0)  # fmt: skip
    rami = (
        Tube.through(
            [(98, -48, -40), (92, -30, -62), (78, -35, -74), (45, -58, -88), (10, -68, -104)], [9, 15, 12, 8, 9]
        ),
        Tube.through([(10, -67, -112), (32, -40, -132), (56, 0, -146), (62, 22, -138)], [8, 7, 9, 13]),
        Tube.through([(62, 22, -138), (76, 26, -105), (86, 20, -76), (88, 22, -45)], [13, 12, 16, 13]),
    )
    cup = Ellipsoid(np.add(HIP_CENTER, (-6.0, 1.0, 3.0)), (29, 30, 31))
    neck = np.add(HIP_CENTER, [(0, 0, 0), (26, 6, -10), (46, 14, -24)])
    shaft = np.add(HIP_CENTER, [(50, 18, -12), (44, 12, -50), (36, 4, -90), (22, -2, -190)])
    femur = (
        Ellipsoid(HIP_CENTER, (24, 24, 24)),
        Tube.through(neck, [17, 15.5, 18]),
        Tube.through(shaft, [15, 17, 14.5, 14]),
    )
    for side, s in SIGN.items():
        _paint_bone(canvas, [shape.mirrored(s) for shape in (wing, *rami, cup)], f"hip_bone_{side}", 1.7)
        space = Ellipsoid(HIP_CENTER, (26.5, 26.5, 26.5)).mirrored(s)
        space.paint(canvas, [(0.0, f"hip_bone_{side}", "cartilage")])
        _paint_bone(canvas, [shape.mirrored(s) for shape in femur], f"femur_{side}", 2.2, "fatty_marrow")
        # The shaft's thick cortex.
        femur[2].mirrored(s).paint(canvas, [(2.0, f"femur_{side}", "cortical"), (6.5, f"femur_{side}", "fatty_marrow")],
                                   clip=lambda x, y, z: z < -125)  # fmt: skip
    Ellipsoid((0, -67, -107), (5, 8, 16)).paint(canvas, [(0.0, "hip_bone_left", "cartilage")])
