"""What the long-lived helper process knows: model, embeddings and prior alignments, ready for the next click.

The protocol around it (JSON lines) is `uae.cli.worker`. One request is a mapping with a "command"; the answer is a
mapping of plain values, fit for JSON.
"""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uae.errors import InputError
from uae.json_values import plain
from uae.progress import Cancel, Progress, report

if TYPE_CHECKING:
    import numpy as np

    from uae.embedding import Embedding
    from uae.matching import Match
    from uae.models import Model
    from uae.registration.relate import Relation
    from uae.volume import Volume

logger = logging.getLogger(__name__)

Partial = Callable[[dict[str, Any]], None]
"""Called with a first, quicker answer."""

UNUSED_EMBEDDINGS = 2
"""Embeddings kept that no prepared pair uses: the template of the next pair is often the last one's."""

METHODS = ("auto", "fixed-point", "guided", "nearest")
GUIDED = ("auto", "guided", "guided-nearest")


@dataclass
class _Pair:
    """A prepared pair: what it was made from, the scans' relation, and what was answered."""

    key: tuple[Any, ...]
    used: tuple[Any, Any]
    relation: Relation
    model: Model
    answer: dict[str, Any]

    def seen_by(self, method: str) -> tuple[Embedding, Embedding]:
        """The embeddings that a matching method compares."""
        return self.relation.seen if method in GUIDED else self.relation.own


@dataclass
class _Call:
    """One request with its ways back to whoever asked."""

    values: Mapping[str, Any]
    progress: Progress | None = None
    partial: Partial | None = None
    cancel: Cancel | None = None

    def text(self, name: str) -> str:
        value = self.values.get(name)
        if not isinstance(value, str) or not value:
            raise InputError(f"the request's {name!r} is missing or no text; give one")
        return value


@dataclass
class Worker:
    """Answers requests one after the other.

    Attributes:
        model: registry name or file; None takes the default for each pair's modalities.
        device: auto, cpu, cuda or cuda:N; a GPU that is not there is replaced by the CPU, with a warning.
        memory_mb: bound on the network's working memory.
        cache: use the embeddings on disk.
    """

    model: str | None = None
    device: str = "auto"
    memory_mb: float = 2000.0
    cache: bool = True
    _models: dict[str, Model] = field(default_factory=dict, repr=False)
    _embeddings: OrderedDict[tuple[Any, ...], Embedding] = field(default_factory=OrderedDict, repr=False)
    _pairs: dict[str, _Pair] = field(default_factory=dict, repr=False)

    def answer(
        self,
        values: Mapping[str, Any],
        progress: Progress | None = None,
        partial: Partial | None = None,
        cancel: Cancel | None = None,
    ) -> dict[str, Any]:
        """Answer one request.

        Args:
            values: "command" and what belongs to it. Points are LPS mm, matrices 4x4 LPS mm.

                * load: model (name, file or null), device.
                * prepare: pair (any name), template and query, each {path, modality}; model and device where these are
                  not to be the loaded ones. Embeds both and relates them.
                * match: pair, points (N x 3), labels, method (auto, guided, fixed-point, nearest), side.
                * similarity_map: pair, point, method, output (an image file).
                * forget: pair.
            progress: told stage and fraction.
            partial: told the nearest-neighbour answer of a `match` before the better one.
            cancel: asked while working.

        Returns:
            Plain values; see the functions of the commands.

        Raises:
            InputError: an unknown command or pair, bad values, scans that cannot be used.
            ResourceError: out of memory or disk.
            CancelledError: `cancel` said so.
        """
        commands = {
            "load": self._load,
            "prepare": self._prepare,
            "match": self._match,
            "similarity_map": self._similarity_map,
            "forget": self._forget,
        }
        command = commands.get(str(values.get("command")))
        if command is None:
            raise InputError(f"unknown command {values.get('command')!r}; use one of {', '.join(commands)}")
        return plain(command(_Call(values, progress, partial, cancel)))

    def _load(self, call: _Call) -> dict[str, Any]:
        """Choose model and device, and load the model; pairs prepared with another one stay until prepared again."""
        from uae.device import describe_device, resolve_device

        model = call.values.get("model") or None
        device = _usable_device(str(call.values.get("device") or "auto"))
        loaded = self._loaded(str(model)) if model else None
        self.model, self.device = model, device
        return {"model": _model_facts(loaded) if loaded else None, "device": describe_device(resolve_device(device))}

    def _loaded(self, name: str) -> Model:
        if name not in self._models:
            from uae.models import load_model

            self._models[name] = load_model(name)
        return self._models[name]

    def _prepare(self, call: _Call) -> dict[str, Any]:
        """Embed both scans and find their prior alignment: its verdict, matrix, and what it was found with."""
        import numpy as np

        from uae.device import describe_device, expected_cpu_time, resolve_device
        from uae.models import default_model
        from uae.registration.relate import relate

        name = call.text("pair")
        asked_device = str(call.values.get("device") or self.device)
        device = _usable_device(asked_device)
        wanted = call.values.get("model") or self.model
        asked = [_scan_request(call.values, role) for role in ("template", "query")]
        key = (wanted, device, *asked)
        if name in self._pairs and self._pairs[name].key == key:
            return self._pairs[name].answer
        start = time.perf_counter()
        report(call.progress, "read", 0.0)
        volumes = [_read(request, role) for request, role in zip(asked, ("template", "query"), strict=True)]
        if device != asked_device:
            million = sum(float(np.prod(volume.geometry.extent_mm)) for volume in volumes) / 8e6
            logger.warning("on the CPU the embeddings take %s", expected_cpu_time(million))
        model = self._loaded(wanted or default_model(volumes[0].modality, volumes[1].modality))
        seconds = {"read": time.perf_counter() - start}
        with _watch_fallback() as fallback:
            moment = time.perf_counter()
            embedded = [
                self._embedded((*request, model.sha256), volume, model, device, call, role)
                for request, volume, role in zip(asked, volumes, ("template", "query"), strict=True)
            ]
            seconds["embed"] = time.perf_counter() - moment
            moment = time.perf_counter()
            relation = relate(
                *volumes,
                *embedded,
                model,
                device=device,
                memory_mb=self.memory_mb,
                cache=self.cache,
                progress=call.progress,
                cancel=call.cancel,
            )
            seconds["relate"] = time.perf_counter() - moment
        seconds["total"] = time.perf_counter() - start
        found = relation.found
        answer = {
            "pair": name,
            "verdict": found.verdict,
            "reason": found.reason,
            "template_to_query": None if found.transform is None else found.transform.matrix,
            "template_modality": {"modality": volumes[0].modality, "reason": volumes[0].modality_reason},
            "query_modality": {"modality": volumes[1].modality, "reason": volumes[1].modality_reason},
            "device": describe_device(resolve_device(fallback[-1] if fallback else device)),
            "model": _model_facts(model),
            "seconds": seconds,
        }
        used = tuple((*request, model.sha256) for request in asked)
        self._pairs[name] = _Pair(key, used, relation, model, plain(answer))
        self._forget_unused()
        return answer

    def _embedded(
        self, key: tuple[Any, ...], volume: Volume, model: Model, device: str, call: _Call, role: str
    ) -> Embedding:
        if key in self._embeddings:
            self._embeddings.move_to_end(key)
            return self._embeddings[key]
        from uae.embedding import embed

        found = embed(
            volume,
            model,
            device=device,
            memory_mb=self.memory_mb,
            cache=self.cache,
            progress=lambda stage, fraction: report(call.progress, f"{stage}: {role}", fraction),
            cancel=call.cancel,
        )
        self._embeddings[key] = found
        return found

    def _forget_unused(self) -> None:
        used = {key for pair in self._pairs.values() for key in pair.used}
        unused = [key for key in self._embeddings if key not in used]
        for key in unused[: max(0, len(unused) - UNUSED_EMBEDDINGS)]:
            del self._embeddings[key]

    def _match(self, call: _Call) -> dict[str, Any]:
        """Match points of the template: the nearest neighbours go to `partial`, the asked method is returned."""
        pair = self._pair(call)
        points, labels = _points_and_labels(call.values)
        method, side = _method(call), call.values.get("side", 5)
        if isinstance(side, bool) or not isinstance(side, int) or side < 1 or side % 2 == 0:
            raise InputError(f"side {side!r}: give an odd number of cells, such as 5")
        quick = "guided-nearest" if method in GUIDED else "nearest"
        matches = _match_all(pair, points, labels, quick, side, None, call.cancel)
        if method != "nearest":
            if call.partial is not None:
                call.partial({"pair": call.values["pair"], "matches": plain(matches)})
            matches = _match_all(pair, points, labels, method, side, call.progress, call.cancel)
        return {"pair": call.values["pair"], "matches": matches}

    def _similarity_map(self, call: _Call) -> dict[str, Any]:
        """Write the similarity of one template point to every cell of the query's body."""
        from uae.matching import similarity_map

        pair = self._pair(call)
        points, _ = _points_and_labels({"points": [call.values.get("point")]})
        output = call.text("output")
        similarity_map(*pair.seen_by(_method(call)), points[0]).write(output)
        return {"pair": call.values["pair"], "output": output}

    def _forget(self, call: _Call) -> dict[str, Any]:
        known = self._pairs.pop(call.text("pair"), None) is not None
        self._forget_unused()
        return {"pair": call.values["pair"], "known": known}

    def _pair(self, call: _Call) -> _Pair:
        name = call.text("pair")
        if name not in self._pairs:
            raise InputError(f"the pair {name!r} is not prepared; prepare it first")
        return self._pairs[name]


def _match_all(
    pair: _Pair,
    points: np.ndarray,
    labels: list[str],
    method: str,
    side: int,
    progress: Progress | None,
    cancel: Cancel | None,
) -> list[dict[str, Any]]:
    """Matches of points (N, 3) LPS mm, in order; a point outside the template scan gets no place, and the reason."""
    from uae.matching import inside_scan, match_points

    found, seen, guided = pair.relation.found, pair.seen_by(method), method in GUIDED
    # match_points would refuse a point outside, and with it all others
    inside = inside_scan(seen[0], points)
    matches: list[Match] = []
    if inside.any():
        matches = match_points(
            *seen,
            points[inside],
            [label for label, ok in zip(labels, inside, strict=True) if ok],
            method=method,
            side=side,
            prior=found.transform if guided else None,
            prior_verdict=found.verdict if guided else None,
            limits=pair.model.thresholds.get("match"),
            progress=progress,
            cancel=cancel,
        )
    answers = iter(matches)
    return [_match_facts(next(answers)) if ok else _outside(label) for label, ok in zip(labels, inside, strict=True)]


def _method(call: _Call) -> str:
    method = call.values.get("method") or "auto"
    if method not in METHODS:
        raise InputError(f"unknown matching method {method!r}; use one of {', '.join(METHODS)}")
    return method


def _match_facts(match: Match) -> dict[str, Any]:
    names = (
        "label", "point_mm", "score", "cycle_mm", "method", "confident", "reason", "fixed_points", "competitor_mm",
        "competitor_score",
    )  # fmt: skip
    return {name: getattr(match, name) for name in names}


def _outside(label: str) -> dict[str, Any]:
    return {
        "label": label, "point_mm": None, "score": None, "cycle_mm": None, "method": "none", "confident": False,
        "reason": "the point lies outside the template scan; place it inside", "fixed_points": 0,
        "competitor_mm": None, "competitor_score": None,
    }  # fmt: skip


def _points_and_labels(values: Mapping[str, Any]) -> tuple[np.ndarray, list[str]]:
    """Points (N, 3) LPS mm, finite, and as many labels."""
    import numpy as np

    try:
        points = np.array(values.get("points"), dtype=np.float64)
    except (TypeError, ValueError):
        points = np.empty(0)
    if points.ndim != 2 or points.shape[1] != 3 or not len(points) or not np.isfinite(points).all():
        raise InputError("the request's points must be a list of [L, P, S] in finite millimetres; give at least one")
    labels = values.get("labels") or [f"F-{number}" for number in range(1, len(points) + 1)]
    if not isinstance(labels, list) or len(labels) != len(points):
        raise InputError(f"{len(points)} points need as many labels; give one a point")
    return points, [str(label) for label in labels]


def _scan_request(values: Mapping[str, Any], role: str) -> tuple[Any, ...]:
    """What decides a scan: path, modality asked for, and the state of its file or of its folder's files."""
    request = values.get(role)
    if not isinstance(request, Mapping) or not isinstance(request.get("path"), str):
        raise InputError(f"the request's {role!r} needs a path; give {{path, modality}}")
    path = Path(request["path"])
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        state = tuple((file.name, (status := os.stat(file)).st_size, status.st_mtime_ns) for file in files)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; check the {role} scan's file") from error
    return str(path.absolute()), str(request.get("modality") or "auto"), state


def _read(request: tuple[Any, ...], role: str) -> Volume:
    from uae.preprocess import decide_modality
    from uae.volume import Volume

    volume = Volume.read(request[0])
    volume.modality, volume.modality_reason = decide_modality(volume, request[1], f"the {role} modality")
    return volume


def _usable_device(name: str) -> str:
    """`name`, or cpu where it names a GPU that is not here.

    Raises:
        InputError: no name of a device.
    """
    from uae.device import resolve_device

    try:
        resolve_device(name)
    except InputError as error:
        if not name.startswith("cuda"):
            raise
        logger.warning("%s; the CPU is used", str(error).partition(";")[0])
        return "cpu"
    return name


@contextmanager
def _watch_fallback() -> Iterator[list[str]]:
    """Yield a list that receives the device which took over where a GPU's memory ended."""
    devices: list[str] = []

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if getattr(record, "fallback_device", None):
                devices.append(record.fallback_device)

    watch, log = Watch(), logging.getLogger("uae.inference")
    log.addHandler(watch)
    try:
        yield devices
    finally:
        log.removeHandler(watch)


def _model_facts(model: Model) -> dict[str, str]:
    return {"name": model.name, "version": model.version, "sha256": model.sha256}
