"""Which organ a voxel belongs to, by the nearest of the organs' mean embeddings, on validation or on test scans.

The mean embedding of an organ over labelled phantoms is its prototype (UAE papers, semantic branch); nothing is fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from uae.bench.study import Setup, Study
from uae.embedding import Embedding
from uae.phantom import FIRST_TEST_SEED, TRAINING_SEEDS, VALIDATION_SEEDS, Phantom, make_phantom
from uae.training.labels import ClassTable, phantom_classes
from uae.volume import Volume

PROTOTYPE_SEEDS = tuple(TRAINING_SEEDS[:6])
QUICK_PROTOTYPE_SEEDS = PROTOTYPE_SEEDS[:2]
TEST_SEEDS = tuple(FIRST_TEST_SEED + 3000 + k for k in range(4))
CHOOSING_SEEDS = tuple(VALIDATION_SEEDS[0] + 7000 + k for k in range(4))
"""Phantoms of the validation range, away from those of the other studies: by them a semantic head may be chosen."""
MR_SLICE_MM = 4.0
MOST_POINTS = 1500
"""Voxels of each class that are looked at in a scan; a share of 90 % is then known to 1.5 %."""

SLAB = "ct_ts_dicomslab"
SLAB_CLASSES: dict[int, str] = {
    1: "spleen", 5: "liver", 6: "stomach", 7: "pancreas", 8: "adrenal_gland_right", 20: "colon", 32: "vertebrae_T12",
    33: "vertebrae_T11", 52: "aorta", 63: "inferior_vena_cava", 64: "portal_vein_and_splenic_vein", 69: "humerus_left",
    70: "humerus_right", 79: "spinal_cord", 86: "autochthon_left", 87: "autochthon_right",
    **{92 + k: f"rib_left_{k + 1}" for k in range(12)}, **{104 + k: f"rib_right_{k + 1}" for k in range(12)},
    117: "costal_cartilages",
}  # fmt: skip
"""Labels of the slab -> names of TotalSegmentator's task `total`, version 2."""

Vectors = dict[str, np.ndarray]
"""By head ("appearance", "semantic", "all") unit vectors (N, D_head) float32."""


def phantom_names() -> dict[int, str]:
    """Phantom label -> class name, TotalSegmentator's where both mean the same."""
    table = ClassTable()
    numbers = phantom_classes(table)
    return {label: table.names[number] for label, number in numbers.items()}


def class_points(
    labels: Volume, names: Mapping[int, str], most: int = MOST_POINTS, seed: int = 0
) -> dict[str, tuple[np.ndarray, int]]:
    """Random voxel centres of every class of a label map.

    Args:
        labels: whole numbers on any grid.
        names: label -> class; labels that share a name are one class.
        most: points a class.
        seed: decides which.

    Returns:
        Class -> its points (N, 3) LPS mm and the number of its voxels.
    """
    rng = np.random.default_rng(seed)
    classes = list(dict.fromkeys(names.values()))
    values = np.asarray(labels.array).ravel()
    table = np.zeros(max(int(values.max()), *names) + 1, np.int16)
    for label, name in names.items():
        table[label] = classes.index(name) + 1
    numbers = table[values]
    cells = np.flatnonzero(numbers)
    cells = cells[np.argsort(numbers[cells], kind="stable")]
    bounds = np.searchsorted(numbers[cells], np.arange(1, len(classes) + 2))
    found = {}
    for name, first, last in zip(classes, bounds[:-1], bounds[1:], strict=True):
        if last > first:
            chosen = rng.choice(cells[first:last], min(most, last - first), replace=False)
            index = np.stack(np.unravel_index(chosen, labels.array.shape)[::-1], axis=1)
            found[name] = labels.geometry.index_to_mm(index), int(last - first)
    return found


def head_vectors(embedding: Embedding, points: np.ndarray) -> Vectors:
    """Unit vectors of points (N, 3) LPS mm by head: appearance (fine and coarse) and, where there is one, semantic.

    A point outside the scan has zeros.
    """
    values = embedding.descriptors(points)
    if embedding.semantic is None:
        return {"appearance": values}
    split = values.shape[1] - len(embedding.semantic)
    parts = {"appearance": values[:, :split], "semantic": values[:, split:], "all": values}
    return {name: part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12) for name, part in parts.items()}


def class_means(scans: Sequence[tuple[Embedding, Volume]], names: Mapping[int, str]) -> dict[str, Vectors]:
    """Prototypes: by class and head the mean over the scans of the mean unit vector, at unit length.

    Args:
        scans: embeddings with label maps in the same millimetres.
        names: label -> class.

    Returns:
        Class -> head -> (D_head,).
    """
    sums: dict[str, Vectors] = {}
    for embedding, labels in scans:
        for name, (points, _) in class_points(labels, names).items():
            for head, vectors in head_vectors(embedding, points).items():
                own = sums.setdefault(name, {})
                own[head] = own.get(head, 0.0) + vectors.mean(axis=0)
    return {
        name: {head: total / max(float(np.linalg.norm(total)), 1e-12) for head, total in heads.items()}
        for name, heads in sums.items()
    }


def nearest_class(vectors: np.ndarray, prototypes: Mapping[str, np.ndarray]) -> np.ndarray:
    """Name of the nearest prototype (largest cosine) of vectors (N, D); "" for a vector of zeros.

    Args:
        vectors: (N, D).
        prototypes: class -> (D,) unit vector.
    """
    names = np.array(list(prototypes))
    picked = names[np.argmax(vectors @ np.stack(list(prototypes.values())).T, axis=1)]
    return np.where(np.linalg.norm(vectors, axis=1) > 0, picked, "")


def classify(
    embedding: Embedding, labels: Volume, names: Mapping[int, str], means: Mapping[str, Vectors]
) -> dict[str, dict[str, Any]]:
    """How many voxels of each shared class have the right nearest prototype.

    Args:
        embedding: of the scan.
        labels: its label map, on any grid in the same millimetres.
        names: label -> class.
        means: of `class_means`.

    Returns:
        Class -> {"voxels", "looked_at", "right": {head: count}, "right_among_shared": {head: count}}: among all
        prototypes, and among those of the classes that the label map shares with them.
    """
    points = {name: value for name, value in class_points(labels, names).items() if name in means}
    result: dict[str, dict[str, Any]] = {}
    for name, (places, voxels) in points.items():
        own = result[name] = {"voxels": voxels, "looked_at": len(places), "right": {}, "right_among_shared": {}}
        for head, vectors in head_vectors(embedding, places).items():
            every = {other: heads[head] for other, heads in means.items()}
            for key, among in (("right", every), ("right_among_shared", {other: every[other] for other in points})):
                own[key][head] = int((nearest_class(vectors, among) == name).sum())
    return result


def phantom_cases(setup: Setup, seeds: Sequence[int] = CHOOSING_SEEDS) -> list[str]:
    """Cases "phantom_ct SEED" and "phantom_mr SEED"; of the first seed alone where it has to be quick."""
    return [f"phantom_{kind} {seed}" for seed in seeds[: 1 if setup.quick else None] for kind in ("ct", "mr")]


def organ_cases(setup: Setup) -> list[str]:
    """Those of the test seeds, and the labelled slab."""
    return [*phantom_cases(setup, TEST_SEEDS), SLAB]


def _prototype_seeds(setup: Setup) -> tuple[int, ...]:
    return QUICK_PROTOTYPE_SEEDS if setup.quick else PROTOTYPE_SEEDS


def _means(setup: Setup) -> dict[str, Vectors]:
    def scans() -> Any:
        for seed in _prototype_seeds(setup):
            phantom = make_phantom(seed, mr=False)
            yield setup.embed(phantom.ct, cache=False), phantom.labels

    return setup.remember("prototypes", lambda: class_means(scans(), phantom_names()))


def measure_organs(setup: Setup, name: str) -> dict[str, Any]:
    """One case of `organ_cases`: {"kind", "classes": of `classify`}."""
    means = _means(setup)
    if name == SLAB:
        labels = Volume.read(setup.data.file(f"{SLAB}/labels_ts.nii.gz"), label=True)
        found = classify(setup.embed(setup.data.ct(SLAB)), labels, SLAB_CLASSES, means)
        return {"kind": SLAB, "classes": found}
    kind, seed = name.split()
    phantom: Phantom = setup.remember(f"phantom {seed}", lambda: make_phantom(int(seed), mr_slice_mm=MR_SLICE_MM))
    scan = phantom.ct if kind == "phantom_ct" else phantom.mr
    return {"kind": kind, "classes": classify(setup.embed(scan, cache=False), phantom.labels, phantom_names(), means)}


def summarise_organs(records: Sequence[Mapping[str, Any]], thresholds: Mapping[str, Any] | None = None) -> dict:
    """By kind of scan and head: accuracies over all its scans.

    Args:
        records: of `measure_organs`.
        thresholds: not used.

    Returns:
        kind -> {"scans", head -> {"voxel_accuracy", "class_mean", "voxel_accuracy_among_shared",
        "class_mean_among_shared", "classes": {class: accuracy}}}: share of labelled voxels whose nearest prototype is
        right, and the mean of the classes' shares; among all prototypes, or among those of the shared classes.
    """
    result: dict[str, Any] = {}
    for kind in dict.fromkeys(record["kind"] for record in records):
        own = [record["classes"] for record in records if record["kind"] == kind]
        result[kind] = {"scans": len(own)}
        heads = next((list(entry["right"]) for classes in own for entry in classes.values()), [])
        for head in heads:
            result[kind][head] = _accuracies(own, head)
    return result


def _accuracies(scans: Sequence[Mapping[str, Any]], head: str) -> dict[str, Any]:
    names = sorted({name for classes in scans for name in classes})
    figures: dict[str, Any] = {}
    for key, suffix in (("right", ""), ("right_among_shared", "_among_shared")):
        voxels, right = dict.fromkeys(names, 0), dict.fromkeys(names, 0.0)
        for classes in scans:
            for name, entry in classes.items():
                voxels[name] += entry["voxels"]
                right[name] += entry["voxels"] * entry[key][head] / entry["looked_at"]
        shares = {name: right[name] / voxels[name] for name in names}
        figures[f"voxel_accuracy{suffix}"] = sum(right.values()) / sum(voxels.values())
        figures[f"class_mean{suffix}"] = sum(shares.values()) / len(shares)
        if not suffix:
            figures["classes"] = shares
    return figures


ORGANS = Study(
    "organs", organ_cases, measure_organs, summarise_organs,
    lambda setup: {"prototype_seeds": _prototype_seeds(setup), "points": MOST_POINTS}, test=True,
)  # fmt: skip
VALIDATION_ORGANS = replace(ORGANS, name="validation_organs", cases=phantom_cases, test=False)
