"""Organs and vessels of the canonical body (coordinates as in skeleton.py)."""

from __future__ import annotations

import numpy as np

from uae.phantom.body import LIVER_VESSELS, diaphragm_z
from uae.phantom.canvas import Canvas, Ellipsoid, Tube, paint_union, rotation, smooth_path
from uae.phantom.skeleton import HIP_CENTER, RIB_CAGE, SIGN, spine_y

CARINA = np.array([2.0, 14.0, 358.0])
KIDNEYS = {
    "left": Ellipsoid((66, 40, 137), (28, 26, 57), rotation(-10, 10, 20)),
    "right": Ellipsoid((-64, 42, 119), (28, 26, 56), rotation(-10, -10, -20)),
}
_APEX = np.array([0.74, -0.52, -0.43])


def _frame(direction: np.ndarray) -> np.ndarray:
    """Axes (3, 3) whose first column is `direction`."""
    first = direction / np.linalg.norm(direction)
    second = np.cross([0.0, 0.0, 1.0], first)
    second /= np.linalg.norm(second)
    return np.stack([first, second, np.cross(first, second)], axis=1)


HEART = _frame(_APEX)
LV_CENTER = np.array([42.0, -28.0, 276.0])
HEART_APEX = LV_CENTER + 50.0 * HEART[:, 0]
SPLEEN = Ellipsoid((100, 40, 186), (30, 51, 62), rotation(-25, 12, 30))
BLADDER = Ellipsoid((0, -40, -78), (39, 33, 29))

AORTA = Tube.through(
    [(4, -18, 318), (-12, -30, 342), (-14, -28, 362), (4, -20, 380), (23, 0, 383), (29, 27, 367), (27, 40, 335),
     (26, 42, 290), (22, 36, 245), (13, 20, 200), (8, 6, 155), (7, -4, 110), (5, -6, 62)],
    [16, 16, 15, 14, 13.5, 13, 12, 12, 11.5, 11, 10, 9.5, 9], 7.0,
)  # fmt: skip
CAVA = Tube.through(
    [(-20, 2, 34), (-23, -2, 70), (-24, 0, 120), (-26, 6, 165), (-24, 6, 205), (-22, 4, 240), (-26, -4, 264),
     (-30, -8, 285)],
    [10, 10.5, 11, 11.5, 12.5, 13, 12, 12], 7.0,
)  # fmt: skip
COLON = (
    (-98, -22, 0), (-104, -22, 25), (-106, -14, 70), (-100, -14, 112), (-78, -52, 124), (-42, -74, 104), (0, -80, 90),
    (40, -78, 100), (76, -62, 130), (106, -10, 172), (112, 8, 150), (114, 12, 100), (110, 6, 50), (102, -12, 10),
    (84, -30, -15), (52, -40, -32), (22, -20, -22), (2, 12, -22), (4, 40, -40),
)  # fmt: skip
COLON_RADII = (25, 26, 24, 22, 20, 19, 19, 19, 19, 18, 16, 15, 15, 15, 15, 15, 15, 15, 16)
RECTUM = ((4, 40, -40), (0, 50, -62), (0, 50, -90), (0, 36, -115), (0, 30, -132))
STOMACH = ((48, 14, 236), (62, 10, 222), (70, -18, 196), (62, -50, 168), (34, -66, 150), (4, -58, 148), (-20, -38, 150))
STOMACH_RADII = (20, 33, 34, 29, 23, 17, 10)


def small_bowel_path() -> np.ndarray:
    """Centre line of the small bowel: rows of loops in three layers, (K, 3) canonical mm."""
    points = []
    rows = [(84, 68), (58, 78), (32, 80), (6, 74), (-20, 62), (-44, 44)]
    sweep = 0
    for k, (height, reach) in enumerate(rows):
        layers = (-64, -38, -12) if k % 2 == 0 else (-12, -38, -64)
        for depth in layers:
            across = np.linspace(-reach, reach, 6) * (1 if sweep % 2 == 0 else -1)
            for j, x in enumerate(across):
                points.append((x, depth + 6.0 * np.sin(2.1 * j + k), height + 9.0 * np.cos(3.1 * j + depth)))
            sweep += 1
    return np.array(points, float)


HEART_PARTS = ("myocardium", "left_ventricle", "right_ventricle", "left_atrium", "right_atrium", "pulmonary_artery")


def paint_heart(canvas: Canvas) -> None:
    """Pericardial fat, chambers, pulmonary arteries and veins; all of it above the diaphragm and inside the ribs."""
    lungs = ("lung_left", "lung_right", "mediastinal_fat")
    chest = (*lungs, *HEART_PARTS)
    fat = (Ellipsoid((20, -32, 280), (77, 51, 50), HEART), Ellipsoid((-4, -24, 312), (45, 41, 36)))
    paint_union(canvas, fat, [(0.0, "mediastinal_fat", "visceral_fat")], lungs)
    Ellipsoid((-34, -18, 286), (28, 31, 40)).paint(canvas, [(0.0, "right_atrium", "venous")], chest)
    right = Ellipsoid((12, -50, 276), (62, 32, 38), HEART)
    right.paint(canvas, [(0.0, "myocardium", "myocardium"), (3.8, "right_ventricle", "venous")], chest)
    trunk = Tube.through([(16, -58, 300), (18, -56, 322), (20, -40, 342)], [16, 15, 14])
    trunk.paint(canvas, [(0.0, "pulmonary_artery", "lung_vessel")])
    veins = [Tube.through([(s * 28, 14, 310), (s * 46, 20, z)], [9, 7]) for s in (1, -1) for z in (300, 322)]
    paint_union(canvas, [Ellipsoid((2, 12, 306), (41, 23, 27)), *veins], [(0.0, "left_atrium", "lung_vessel")], chest)
    Ellipsoid(LV_CENTER, (55, 38, 38), HEART).paint(canvas, [(0.0, "myocardium", "myocardium")], chest)
    cavity = Ellipsoid(LV_CENTER - 8.0 * HEART[:, 0], (43, 26, 26), HEART)
    cavity.paint(canvas, [(0.0, "left_ventricle", "arterial")], chest)
    branches = ([(20, -40, 342), (6, -20, 346), (-18, -6, 342), (-44, 4, 336)], [13, 11, 11, 8]), (
        [(20, -40, 342), (30, -16, 350), (42, 10, 346), (50, 20, 332)], [13, 12, 10, 8])  # fmt: skip
    for points, radii in branches:
        Tube.through(points, radii).paint(canvas, [(0.0, "pulmonary_artery", "lung_vessel")])


def paint_chest(canvas: Canvas) -> None:
    """Heart, airways, oesophagus and the vessels of chest and neck."""
    paint_heart(canvas)
    Tube.through(
        [
            (0, 6, 490),
            (3, 14, 440),
            (5, 22, 390),
            (6, 29, 350),
            (6, 31, 310),
            (12, 24, 268),
            (17, 18, 242),
            (24, 12, 230),
        ],
        7.5,
    ).paint(canvas, [(0.0, "oesophagus", "gut_wall")])
    vein = Tube.through([(-30, -14, 305), (-30, -18, 335), (-27, -26, 372), (-24, -32, 388)], [11, 10.5, 10, 8])
    crossing = Tube.through([(-24, -32, 386), (0, -42, 393), (26, -34, 404)], [8, 7.5, 7])
    for tube in (vein, crossing):
        tube.paint(canvas, [(0.0, "vena_cava_superior", "venous")])
    AORTA.paint(canvas, [(0.0, "aorta", "arterial")])
    for s, root in ((1, (22, 2, 390)), (-1, (-12, -16, 384))):
        carotid = [root, (s * 20, -8, 412), (s * 26, -2, 445), (s * 28, 0, 490)]
        Tube.through(carotid, [6, 5, 4, 4]).paint(canvas, [(0.0, "neck_vessels", "arterial")])
        Tube.through([(s * 24, -30, 402), (s * 32, -14, 430), (s * 37, -6, 490)], 6.0).paint(
            canvas, [(0.0, "neck_vessels", "venous")]
        )
        Tube.through([(s * 20, -8, 408), (s * 45, -12, 422), (s * 85, -15, 414), (s * 120, -10, 396)], 5.0).paint(
            canvas, [(0.0, "neck_vessels", "arterial")])  # fmt: skip
        lobe = Ellipsoid((s * 15, -14, 452), (9, 10, 22))
        lobe.paint(canvas, [(0.0, "", "adrenal")], only=("muscle_wall",))
    airway = [
        Tube.through([(0, -14, 500), (0, -8, 440), (1, 4, 395), np.add(CARINA, (0, 0, 4))], [9.5, 9.5, 9.5, 10]),
        Tube.through([CARINA, (-18, 16, 342), (-34, 17, 328), (-44, 14, 305)], [8.5, 8, 7, 5]),
        Tube.through([CARINA, (22, 20, 345), (40, 22, 334), (50, 24, 312)], [8, 7.5, 6.5, 4.5]),
        Tube.through([(-26, 17, 336), (-46, 16, 348), (-58, 14, 360)], [6, 4.5, 3.5]),
        Tube.through([(36, 21, 337), (54, 14, 348), (64, 6, 360)], [5.5, 4.5, 3.5]),
    ]
    paint_union(canvas, airway, [(-1.8, "trachea", "airway_wall"), (0.0, "trachea", "gas")])


def paint_liver(canvas: Canvas) -> None:
    """Liver with veins, and the gallbladder."""
    selection = canvas.select((-135, -98, 95), (90, 90, 262))
    if selection is None:
        return
    x, y, z = canvas.at(selection)
    below = diaphragm_z(x, y) - 4.5 - z
    wall = RIB_CAGE.depth(x, y, z) - 10.5
    bulk = Ellipsoid((-92, 2, 205), (160, 112, 102)).depth(x, y, z)
    under = (z - (145.0 + 0.58 * (x + 55.0) + 0.10 * y + 9.0 * np.sin(x / 24.0))) * 0.8
    behind = (44.0 - 0.85 * np.maximum(x + 24.0, -60.0) - y) * 0.7
    depth = np.minimum.reduce([below, wall, bulk, under, behind])
    canvas.paint(selection, depth > 0, "liver", "liver")
    for points, radii in LIVER_VESSELS:
        Tube.through(points, radii).paint(canvas, [(0.0, "liver_vessels", "liver_vessel")], only=("liver",))
    bladder = Ellipsoid((-52, -52, 146), (15, 17, 31), rotation(25, 0, 0))
    bladder.paint(canvas, [(0.0, "gallbladder", "gut_wall"), (1.5, "gallbladder", "bile")])


def paint_kidneys(canvas: Canvas) -> None:
    """Kidneys with cortex, medulla, pelvis and their vessels; adrenals; spleen."""
    for side, kidney in KIDNEYS.items():
        s = SIGN[side]
        kidney.paint(canvas, [(0.0, f"kidney_{side}", "kidney_cortex")])
        axes, center = kidney.axes, np.asarray(kidney.center, float)
        for along in (-34, -20, -6, 8, 22, 36):
            for turn in (-65, 0, 65):
                c, d = np.cos(np.deg2rad(turn)), np.sin(np.deg2rad(turn))
                shrink = np.sqrt(1 - (along / 62.0) ** 2)
                place = center + axes @ np.array([s * 13.0 * c * shrink, 13.0 * d * shrink, along])
                Ellipsoid(place, (6.5, 6.5, 6.0)).paint(canvas, [(0.0, f"kidney_{side}", "kidney_medulla")])
        hilum = center + axes @ np.array([-s * 20.0, -6.0, 0.0])
        sinus = Ellipsoid(hilum, (15, 10, 22), axes)
        sinus.paint(canvas, [(0.0, "visceral_fat", "visceral_fat")])
        Ellipsoid(np.add(hilum, (s * 2, 0, 0)), (10, 5, 12), axes).paint(
            canvas, [(0.0, f"kidney_{side}", "renal_pelvis")]
        )
        goal = (22, -12, 128) if side == "left" else (-24, 0, 122)
        Tube.through([hilum, np.add(0.5 * (hilum + goal), (0, -5, 0)), goal], [5, 5, 5.5]).paint(
            canvas, [(0.0, "vena_cava_inferior", "venous")]
        )
        gland = Ellipsoid((s * 42, 30, center[2] + 62), (5, 14, 16), rotation(0, s * 25, s * 20))
        gland.paint(canvas, [(0.0, f"adrenal_{side}", "adrenal")], only=("visceral_fat", "liver"))
    SPLEEN.paint(canvas, [(0.0, "spleen", "spleen")], ("visceral_fat",))


def _gut(
    canvas: Canvas, line, radii, structure: str, wall: float, blocks: np.ndarray, block_mm: float, only=()
) -> None:
    """A gut tube whose content changes from block to block along it: gas rises to the front, the rest lies behind."""
    Tube(line, radii).paint(canvas, [(0.0, structure, "gut_wall")], only)
    steps = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
    only = only and (*only, structure)
    for k in range(len(line) - 1):
        kind = blocks[int(steps[k] / block_mm) % len(blocks)]
        piece = Tube(line[k : k + 2], radii[k : k + 2])
        level = 0.5 * float(line[k, 1] + line[k + 1, 1])
        content = "stool" if structure in ("colon", "rectum") else "gut_fluid"
        piece.paint(canvas, [(wall, "", content)], (structure,))
        if kind > 0:
            front = level + float(radii[k]) * (1.6 * kind - 1.0)
            piece.paint(canvas, [(wall, "", "gas")], (structure,), clip=lambda x, y, z, front=front: y < front)


def paint_gut(canvas: Canvas, content: np.random.Generator) -> None:
    """Stomach, duodenum, pancreas, small bowel, colon and rectum; `content` draws how much gas each part holds."""
    cavity = ("visceral_fat", "liver", "small_bowel", "colon", "duodenum", "pancreas", "vena_cava_inferior")

    loops = smooth_path(small_bowel_path(), 11.0, 7.0)[0]
    gas = np.where(content.random(60) < 0.25, content.uniform(0.3, 1.2, 60), 0.0)
    _gut(
        canvas,
        loops,
        12.8 + 1.4 * np.sin(np.arange(len(loops)) * 0.8),
        "small_bowel",
        2.2,
        gas,
        55.0,
        ("visceral_fat",),
    )
    pancreas = Tube.through(
        [(-34, -14, 118), (-30, -12, 138), (-6, -24, 146), (28, -14, 158), (60, 10, 172), (84, 26, 184)],
        [13, 14, 10, 10, 10, 8],
    )
    pancreas.paint(canvas, [(0.0, "pancreas", "pancreas")], only=("visceral_fat", "small_bowel"))
    duodenum = Tube.through(
        [(-24, -34, 150), (-44, -20, 145), (-50, -8, 120), (-44, -8, 96), (-12, -12, 88), (20, -10, 96)],
        [11, 12, 12, 12, 11, 11],
    )
    duodenum.paint(
        canvas,
        [(0.0, "duodenum", "gut_wall"), (2.5, "duodenum", "gut_fluid")],
        only=("visceral_fat", "small_bowel", "duodenum"),
    )
    line, radii = smooth_path(COLON, COLON_RADII, 6.0)
    radii = radii * (1.0 + 0.10 * np.sin(np.arange(len(line)) * 1.25))
    gas = np.where(content.random(40) < 0.6, content.uniform(0.2, 1.3, 40), 0.0)
    _gut(canvas, line, radii, "colon", 2.4, gas, 42.0, ("visceral_fat", "small_bowel", "liver", "duodenum"))
    line, radii = smooth_path(RECTUM, [16, 19, 18, 13, 9], 6.0)
    gas = np.where(content.random(8) < 0.5, content.uniform(0.2, 0.9, 8), 0.0)
    _gut(canvas, line, radii, "rectum", 3.2, gas, 40.0)
    stomach = Tube.through(STOMACH, STOMACH_RADII, 6.0)
    stomach.paint(canvas, [(0.0, "stomach", "gut_wall"), (3.8, "stomach", "gut_fluid")], only=(*cavity, "stomach"))
    level = content.uniform(-75.0, -20.0)
    stomach.paint(canvas, [(3.8, "stomach", "gas")], only=("stomach",), clip=lambda x, y, z: y < level)


def paint_abdomen(canvas: Canvas, content: np.random.Generator) -> None:
    """Liver, kidneys, gut, and the great vessels of the abdomen with their branches."""
    paint_liver(canvas)
    paint_kidneys(canvas)
    paint_gut(canvas, content)
    CAVA.paint(canvas, [(0.0, "vena_cava_inferior", "venous")])
    AORTA.paint(canvas, [(0.0, "aorta", "arterial")], clip=lambda x, y, z: z < 250)
    portal = [(14, -14, 142), (-6, -14, 152), (-20, -12, 168), (-30, -12, 178)]
    splenic = [(78, 28, 192), (40, 2, 166), (-2, -14, 150)]
    mesenteric = [(-4, -14, 150), (-2, -28, 110), (-14, -34, 60), (-34, -30, 20)]
    for points, radii in ((portal, 6.5), (splenic, 4.5), (mesenteric, [6, 5, 4, 3])):
        Tube.through(points, radii).paint(canvas, [(0.0, "liver_vessels", "liver_vessel")])
    arteries = (
        ([(8, 0, 150), (6, -22, 128), (2, -32, 90), (10, -36, 40)], [4, 4, 3.5, 2.5]),
        ([(9, 2, 168), (8, -18, 172), (-12, -18, 168)], [4, 4, 3]),
        ([(7, -4, 128), (30, 18, 130), (46, 34, 134)], [3, 3, 2.5]),
        ([(7, -4, 124), (-24, 16, 118), (-46, 36, 117)], [3, 3, 2.5]),
    )  # fmt: skip
    for points, radii in arteries:
        Tube.through(points, radii).paint(canvas, [(0.0, "aorta", "arterial")])


def paint_pelvis(canvas: Canvas) -> None:
    """Iliac vessels, bladder, prostate and seminal vesicles."""
    for s in (1, -1):
        for start, tissue, back in (((s * 4 + 5, -4, 62), "arterial", 0.0), ((-18, 4, 40), "venous", 9.0)):
            line = [start, (s * 26, 4 + back, 25), (s * 46, 14 + back, -8), (s * 66, -22 + back, -50)]
            line += [(s * 84, -62 + 0.5 * back, -88), (s * (86 - back), -60, -130), (s * (78 - back), -40, -220)]
            Tube.through(line, [6.5, 6.5, 6, 6, 5.5, 5.5, 4.5]).paint(canvas, [(0.0, "iliac_vessels", tissue)])
        inner = [(s * 44, 12, -6), (s * 48, 36, -28), (s * 44, 42, -62)]
        Tube.through(inner, [5, 4.5, 3.5]).paint(canvas, [(0.0, "iliac_vessels", "arterial")])
        vesicle = Ellipsoid((s * 14, 2, -98), (15, 6, 6), rotation(0, 0, s * 15))
        vesicle.paint(canvas, [(0.0, "prostate", "prostate")])
    Ellipsoid((0, -34, -117), (23, 18, 17)).paint(canvas, [(0.0, "prostate", "prostate")])
    BLADDER.paint(canvas, [(0.0, "bladder", "gut_wall"), (3.0, "bladder", "urine")])


def organ_landmarks() -> dict[str, np.ndarray]:
    """Named landmarks of organs in canonical mm (those of bones: anatomy.landmarks)."""
    found = {"carina": CARINA, "aortic_arch_top": np.array([14.0, -10.0, 392.0]), "heart_apex": HEART_APEX,
             "aortic_bifurcation": np.array([5.0, -6.0, 70.0]), "bladder_center": np.asarray(BLADDER.center, float),
             "gallbladder_center": np.array([-52.0, -52.0, 146.0])}  # fmt: skip
    for side, kidney in KIDNEYS.items():
        center, pole = np.asarray(kidney.center, float), kidney.axes[:, 2] * (kidney.radii[2] - 4.0)
        found |= {f"kidney_{side}_upper_pole": center + pole, f"kidney_{side}_lower_pole": center - pole}
        found[f"kidney_{side}_lateral"] = center + kidney.axes[:, 0] * SIGN[side] * 20.0
    found["liver_dome"] = np.array([-66.0, -2.0, float(diaphragm_z(np.array(-66.0), np.array(-2.0))) - 7.0])
    found["spleen_lower_tip"] = np.asarray(SPLEEN.center) - SPLEEN.axes[:, 2] * 50.0
    found["spleen_center"] = np.asarray(SPLEEN.center, float)
    for side, s in SIGN.items():
        found[f"hip_joint_{side}"] = HIP_CENTER * [s, 1, 1]
        found[f"lung_apex_{side}"] = np.array([s * 34.0, float(spine_y(424)) - 4, 424.0])
    return found
