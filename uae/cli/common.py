"""What every command shares: progress on screen or as JSON lines, logging, threads, inputs and outputs."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from uae.errors import InputError
from uae.files import as_user_error

if TYPE_CHECKING:
    from uae.embedding import Embedding
    from uae.models import Model
    from uae.volume import Volume

logger = logging.getLogger(__name__)

BAR_WIDTH = 24
REPORT_EVERY_S = 0.2
"""Least time between two reports of one stage: enough for a smooth bar, few enough lines for a log."""


class Session:
    """Where one command says how far it is and what came out.

    With `json` the standard output carries only JSON lines, one report each: {"stage", "percent", "eta_s"}, percent
    0..100 within the stage, eta_s seconds left in it or null; the last line is {"stage": "finished", "percent",
    "eta_s", "exit_code", "message"}. Everything meant for people then goes to the standard error.
    """

    def __init__(self, progress: str = "auto") -> None:
        self.json = progress == "json"
        self.bar = progress == "auto" and sys.stderr.isatty()
        self._stage = ""
        self._started = self._reported = self._first = 0.0
        self._open_line = False
        self._muted = False

    def mute(self) -> None:
        """Say nothing more: another process of the same command speaks."""
        self.json, self.bar, self._muted = False, False, True

    def progress(self, stage: str, fraction: float) -> None:
        """Report `fraction` (0..1) of `stage`; the `Progress` that the core's functions take."""
        if not (self.json or self.bar):
            return
        now = time.monotonic()
        if stage != self._stage:
            self.close()
            self._stage, self._started, self._reported = stage, now, -REPORT_EVERY_S
            self._first = fraction
        elif now - self._reported < REPORT_EVERY_S and fraction < 1:
            return
        self._reported = now
        gained = fraction - self._first  # a resumed training starts far from 0
        eta = (now - self._started) * (1 - fraction) / gained if gained > 0 else None
        if self.json:
            self._line({"stage": stage, "percent": round(100 * fraction, 1), "eta_s": _rounded(eta)})
        else:
            done = round(BAR_WIDTH * fraction)
            left = "" if eta is None or fraction >= 1 else f"{eta:5.0f} s left"
            text = f"\r{stage[:32]:<32} [{'#' * done}{'.' * (BAR_WIDTH - done)}] {100 * fraction:3.0f} % {left:<12}"
            sys.stderr.write(text)
            sys.stderr.flush()
            self._open_line = True

    def close(self) -> None:
        """End the line of an open progress bar."""
        if self._open_line:
            sys.stderr.write("\n")
            self._open_line = False

    def say(self, text: str = "") -> None:
        """Print a result for the user."""
        self.close()
        if not self._muted:
            print(text, file=sys.stderr if self.json else sys.stdout, flush=True)

    def finish(self, exit_code: int, message: str) -> None:
        """Write the last JSON line."""
        if self.json:
            self._line(
                {"stage": "finished", "percent": 100.0, "eta_s": 0.0, "exit_code": exit_code, "message": message}
            )

    @staticmethod
    def _line(record: dict) -> None:
        print(json.dumps(record), flush=True)


class _BarFriendlyHandler(logging.StreamHandler):
    """Ends an open progress bar's line before a log line."""

    def __init__(self, session: Session) -> None:
        super().__init__(sys.stderr)
        self._session = session

    def emit(self, record: logging.LogRecord) -> None:
        self._session.close()
        super().emit(record)


def set_up_logging(verbose: bool, session: Session) -> None:
    """Send the package's log to stderr: warnings always, what is done with -v."""
    handler = _BarFriendlyHandler(session)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s" if verbose else "%(message)s"))
    package = logging.getLogger("uae")
    package.handlers[:] = [handler]
    package.setLevel(logging.INFO if verbose else logging.WARNING)
    if verbose:
        logging.captureWarnings(True)


def limit_threads(threads: int | None) -> None:
    """Bound the threads of everything that computes (None: leave each library's default)."""
    if threads is None:
        return
    # the variables reach what is imported later, the calls what this process has already imported
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = str(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    if "SimpleITK" in sys.modules:
        sys.modules["SimpleITK"].ProcessObject.SetGlobalDefaultNumberOfThreads(threads)


def read_scan(path: str, modality: str, option: str, series: Sequence[str] = ()) -> Volume:
    """Read a scan and decide its modality.

    Args:
        path: image file or DICOM folder.
        modality: auto, ct or mr.
        option: the option that decides it, named where the image leaves a doubt.
        series: UIDs given by --series; the one that the folder holds is taken.

    Returns:
        The volume with `modality` and `modality_reason` set.

    Raises:
        InputError: the scan cannot be read or used, or its modality is doubtful.
    """
    from uae.preprocess import decide_modality
    from uae.volume import Volume

    volume = Volume.read(path, series=_series_of(Path(path), series))
    volume.modality, volume.modality_reason = decide_modality(volume, modality, option)
    logger.info("%s: %s (%s)", path, volume.modality.upper(), volume.modality_reason)
    return volume


def load_model_for(name: str | None, *scans: Volume) -> Model:
    """The model of --model, or the default for the modalities of the scans.

    Raises:
        ModelError: no such model, or its file is damaged or unsafe.
    """
    from uae.models import default_model, load_model

    return load_model(name or default_model(scans[0].modality, scans[-1].modality))


def embed_scan(scan: Volume, model: Model, arguments: argparse.Namespace, session: Session, role: str) -> Embedding:
    """Embed a scan with the command's device, memory bound and cache; `role` names it in the progress."""
    from uae.embedding import embed

    return embed(
        scan,
        model,
        device=arguments.device,
        memory_mb=arguments.memory_mb,
        cache=not arguments.no_cache,
        progress=lambda stage, fraction: session.progress(f"{stage}: {role}", fraction),
    )


def _series_of(folder: Path, series: Sequence[str]) -> str | None:
    if not series or not folder.is_dir():
        return None
    import SimpleITK as sitk

    here = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    return next((uid for uid in series if uid in here), series[0])


def check_writable(output: str | Path, folder: bool = False, suffixes: Sequence[str] = ()) -> Path:
    """Refuse an output that cannot be written before the long work, not after it.

    Args:
        output: the file or folder of --output.
        folder: True where a folder is meant.
        suffixes: the endings a file may have; any where empty.

    Returns:
        The output as a path.

    Raises:
        InputError: wrong ending, a file where a folder is meant (or the other way round), or no permission.
        ResourceError: the disk is full.
    """
    path = Path(output)
    if suffixes and not path.name.lower().endswith(tuple(suffixes)):
        raise InputError(f"--output {path}: the ending says the format; use {' or '.join(suffixes)}")
    try:
        if folder and path.exists() and not path.is_dir():
            raise InputError(f"--output {path} is a file; name a folder")
        if not folder and path.is_dir():
            raise InputError(f"--output {path} is a folder; name a file in it")
        place = path if folder else path.parent
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"\0")
            probe.flush()
    except OSError as error:
        raise as_user_error(error, path) from error
    return path


def names_of(text: str) -> list[str]:
    """The names of a list with commas."""
    return [name for name in text.split(",") if name]


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; its files reach `folder` together, or not at all.

    Args:
        folder: where the files are to be in the end; made if need be.

    Yields:
        A temporary folder beside `folder`, on the same disk.

    Raises:
        InputError: no permission.
        ResourceError: the disk is full.
    """
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        yield temporary
        folder.mkdir(exist_ok=True)
        for file in sorted(temporary.iterdir()):
            os.replace(file, folder / file.name)
    except OSError as error:
        raise as_user_error(error, folder) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)
