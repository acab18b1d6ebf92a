"""Names of the phantom's structures and tissues, and what a tissue looks like in CT and MR.

A *label* says which structure a voxel belongs to (liver, rib_left_5); a *tissue* says what it is made of
(cortical bone, marrow, blood) and decides its grey value. Grey values: usual textbook ranges of Hounsfield units and of
relative T1- and T2-weighted signal, jittered per subject so that no two subjects share a contrast.
"""

from __future__ import annotations

import numpy as np

VERTEBRAE = tuple(f"T{k}" for k in range(1, 13)) + tuple(f"L{k}" for k in range(1, 6))
SIDES = ("left", "right")


def _sided(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}_{side}" for name in names for side in SIDES)


STRUCTURES: tuple[str, ...] = (
    "skin", "subcutaneous_fat", "muscle_wall", "visceral_fat", "mediastinal_fat", "diaphragm",
    *_sided("lung"), "trachea", "oesophagus", "myocardium", "left_ventricle", "right_ventricle", "left_atrium",
    "right_atrium", "pulmonary_artery", "aorta", "vena_cava_superior", "vena_cava_inferior", "iliac_vessels",
    "neck_vessels", "liver", "liver_vessels", "gallbladder", "spleen", *_sided("kidney", "adrenal"), "stomach",
    "duodenum", "pancreas", "small_bowel", "colon", "rectum", "bladder", "prostate",
    *_sided("psoas", "erector_spinae", "gluteus"), "cervical_vertebrae",
    *(f"vertebra_{name}" for name in VERTEBRAE), "sacrum", "discs", "spinal_canal", "spinal_cord", "sternum",
    "costal_cartilage", *_sided("clavicle", "scapula", "humerus", "hip_bone", "femur"),
    *(f"rib_{side}_{k}" for side in SIDES for k in range(1, 13)),
)  # fmt: skip
LABEL_NAMES: dict[int, str] = {k + 1: name for k, name in enumerate(STRUCTURES)}
"""Label number -> structure; 0 is the outside."""
LABEL: dict[str, int] = {name: k for k, name in LABEL_NAMES.items()}
LABEL[""] = 0

# CT: mean HU, spread of the mean between subjects, texture (sd, HU); contrast agent (HU added in a full portal phase).
# MR: relative signal T1-like, T2-like.
_TABLE: dict[str, tuple[float, float, float, float, float, float]] = {
    "air": (-1000, 0, 0, 0, 0.00, 0.00),
    "skin": (20, 10, 10, 5, 0.42, 0.30),
    "fat": (-102, 5, 7, 0, 0.92, 0.75),
    "visceral_fat": (-98, 6, 11, 2, 0.88, 0.72),
    "muscle": (54, 5, 10, 12, 0.38, 0.20),
    "cortical": (800, 90, 60, 0, 0.06, 0.05),
    "marrow": (210, 50, 45, 10, 0.62, 0.48),
    "fatty_marrow": (60, 40, 30, 5, 0.80, 0.62),
    "cartilage": (95, 15, 12, 5, 0.35, 0.40),
    "disc": (85, 10, 8, 3, 0.33, 0.55),
    "csf": (12, 4, 4, 0, 0.13, 1.00),
    "cord": (38, 4, 4, 2, 0.42, 0.42),
    "lung": (-835, 35, 28, 12, 0.05, 0.06),
    "lung_vessel": (30, 10, 5, 110, 0.22, 0.16),
    "gas": (-960, 15, 8, 0, 0.02, 0.02),
    "airway_wall": (-20, 30, 10, 15, 0.28, 0.22),
    "gut_wall": (42, 5, 6, 40, 0.38, 0.33),
    "gut_fluid": (18, 12, 12, 0, 0.22, 0.88),
    "stool": (35, 25, 60, 0, 0.45, 0.50),
    "arterial": (46, 4, 4, 170, 0.24, 0.14),
    "venous": (46, 4, 4, 120, 0.26, 0.22),
    "myocardium": (50, 5, 6, 60, 0.40, 0.30),
    "liver": (60, 7, 6, 50, 0.56, 0.30),
    "liver_vessel": (42, 5, 4, 115, 0.32, 0.44),
    "bile": (8, 5, 4, 0, 0.25, 0.96),
    "spleen": (50, 4, 5, 70, 0.38, 0.56),
    "kidney_cortex": (36, 4, 6, 145, 0.50, 0.58),
    "kidney_medulla": (31, 4, 6, 85, 0.36, 0.72),
    "renal_pelvis": (5, 8, 6, 10, 0.30, 0.85),
    "adrenal": (30, 8, 5, 40, 0.42, 0.40),
    "pancreas": (42, 6, 12, 55, 0.58, 0.42),
    "urine": (5, 5, 3, 0, 0.14, 0.98),
    "prostate": (42, 4, 7, 30, 0.40, 0.60),
}
TISSUES: tuple[str, ...] = tuple(_TABLE)
TISSUE: dict[str, int] = {name: k for k, name in enumerate(TISSUES)}
_VALUES = np.array([_TABLE[name] for name in TISSUES])
_DARK = tuple(TISSUE[name] for name in ("air", "gas", "cortical", "lung"))


def ct_table(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Mean and texture of every tissue in one subject's CT.

    Args:
        rng: the subject's random numbers for CT.

    Returns:
        means (T,) and texture standard deviations (T,), HU. Four subjects in ten have no contrast agent.
    """
    agent = 0.0 if rng.random() < 0.4 else rng.uniform(0.4, 1.15)
    phase = rng.uniform(0.6, 1.0, len(TISSUES))
    # An arterial phase: vessels and renal cortex lead, parenchyma lags.
    if rng.random() < 0.3:
        late = np.array([name not in ("arterial", "kidney_cortex", "myocardium", "lung_vessel") for name in TISSUES])
        phase = np.where(late, 0.35 * phase, 1.2 * phase)
    means = _VALUES[:, 0] + rng.normal(0.0, 1.0, len(TISSUES)) * _VALUES[:, 1] + agent * phase * _VALUES[:, 3]
    means[TISSUE["air"]] = -1000.0
    return means, _VALUES[:, 2] * rng.uniform(0.7, 1.4)


def mr_table(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Mean and texture of every tissue in one subject's MR.

    A T1-like, a T2-like, a fat-suppressed, a mixed (balanced) or a partly random contrast, each jittered.

    Args:
        rng: the subject's random numbers for MR.

    Returns:
        means (T,) in 0..1.3 and texture standard deviations (T,), relative signal.
    """
    t1, t2 = _VALUES[:, 4].copy(), _VALUES[:, 5].copy()
    kind = rng.choice(["t1", "t2", "fatsat", "mixed", "random"], p=[0.3, 0.25, 0.15, 0.15, 0.15])
    blend = {"t1": 0.1, "t2": 0.9, "fatsat": 0.8 if rng.random() < 0.7 else 0.2, "mixed": 0.5, "random": 0.5}[str(kind)]
    means = (1.0 - blend) * t1 + blend * t2
    if kind == "fatsat":
        for name in ("fat", "visceral_fat", "fatty_marrow"):
            means[TISSUE[name]] *= rng.uniform(0.12, 0.35)
        means[TISSUE["marrow"]] *= rng.uniform(0.4, 0.8)
    if kind == "random":
        mixed = rng.uniform(0.1, 1.0, len(TISSUES))
        share = rng.uniform(0.3, 0.8)
        means = (1.0 - share) * means + share * mixed
    if rng.random() < 0.45:
        # Blood is bright with contrast agent or in a balanced sequence, dark where it flows through a spin echo.
        bright = rng.uniform(0.6, 1.1)
        for name in ("arterial", "venous", "liver_vessel", "lung_vessel"):
            means[TISSUE[name]] = bright * rng.uniform(0.85, 1.1)
    means = means * rng.lognormal(0.0, 0.16, len(TISSUES))
    for k in _DARK:
        means[k] = min(means[k], 0.02 + 0.5 * _VALUES[k, 4]) if kind == "random" else means[k]
    means[TISSUE["air"]] = 0.0
    texture = (0.03 + 0.05 * rng.random(len(TISSUES))) * means + 0.004
    texture[TISSUE["air"]] = 0.0
    return np.minimum(means, 1.3), texture
