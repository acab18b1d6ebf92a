"""Split a large file into pieces with hashes and join them again: `python -m uae.training.pieces split|join A B`."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

from uae.errors import InputError, UAEError
from uae.files import atomic_path, sha256

PIECE_BYTES = 16 * 2**20
INDEX = "pieces.json"


def split_file(path: Path, folder: Path, piece_bytes: int = PIECE_BYTES) -> list[Path]:
    """Write the pieces of a file and `pieces.json`, last, with their hashes.

    Args:
        path: the file.
        folder: takes the pieces.
        piece_bytes: size of each but the last.

    Raises:
        InputError: there is no such file.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; nothing to split")
    pieces, hashes = [], []
    with path.open("rb") as stream:
        while block := stream.read(piece_bytes):
            piece = folder / f"{path.name}.{len(pieces):03d}"
            with atomic_path(piece) as temporary:
                temporary.write_bytes(block)
            pieces.append(piece)
            hashes.append(hashlib.sha256(block).hexdigest())
    index = {"file": path.name, "sha256": sha256(path), "pieces": dict(zip([p.name for p in pieces], hashes))}
    with atomic_path(folder / INDEX) as temporary:
        temporary.write_text(json.dumps(index, indent=1))
    return pieces


def join_pieces(folder: Path, target: Path) -> Path:
    """Join the pieces in a folder into a file, which appears only if every hash is right.

    Args:
        folder: holds the pieces and `pieces.json`.
        target: the file, or an existing folder or a name without ending in which the file gets its own name.

    Returns:
        The file.

    Raises:
        InputError: a piece is missing or damaged.
    """
    try:
        index = json.loads((folder / INDEX).read_text())
        wanted, name = dict(index["pieces"]), Path(index["file"]).name
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: no usable {INDEX} ({error}); copy the whole folder again") from error
    path = target if target.suffix and not target.is_dir() else target / name
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        for piece, digest in wanted.items():
            source = folder / Path(piece).name
            if not source.is_file():
                raise InputError(f"{source}: the piece is missing; copy it again")
            block = source.read_bytes()
            if hashlib.sha256(block).hexdigest() != digest:
                raise InputError(f"{source}: the piece is damaged; copy it again")
            stream.write(block)
    return path


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m uae.training.pieces", description=__doc__)
    parser.add_argument("what", choices=("split", "join"))
    parser.add_argument("source", type=Path, help="split: the file; join: the folder of the pieces")
    parser.add_argument("target", type=Path, help="split: the folder for the pieces; join: the file or its folder")
    arguments = parser.parse_args()
    try:
        (split_file if arguments.what == "split" else join_pieces)(arguments.source, arguments.target)
    except UAEError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
