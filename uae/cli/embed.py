"""`uae embed`: the embedding of one scan in a file that can be loaded again, and as a picture."""

from __future__ import annotations

import argparse

from uae.cli.common import Session, check_writable, embed_scan, load_model_for, read_scan
from uae.cli.parser import add_command, add_modality_options, add_model_options

VOLUME_FILES = (".nii.gz", ".nii", ".nrrd", ".mha")
EXAMPLE = "  uae embed ct.nii.gz --output ct.uae --pca ct_pca.nii.gz"


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `embed`."""
    parser = add_command(
        commands,
        "embed",
        "Embed a scan: one vector for each 4 mm cell, in a file that can be loaded again. With --pca also its three "
        "principal components as a colour volume.",
        EXAMPLE,
    )
    parser.set_defaults(run=run)
    parser.add_argument("volume", metavar="VOLUME", help="image file or DICOM folder")
    parser.add_argument("--output", required=True, metavar="FILE", help="where the embedding is written")
    parser.add_argument("--pca", metavar="PCA.nii.gz", help="three principal components as a colour image")
    add_modality_options(parser, "")
    add_model_options(parser)


def run(arguments: argparse.Namespace, session: Session) -> int:
    """Embed one scan."""
    output = check_writable(arguments.output)
    pca = check_writable(arguments.pca, suffixes=VOLUME_FILES) if arguments.pca else None
    scan = read_scan(arguments.volume, arguments.modality, "--modality", arguments.series)
    model = load_model_for(arguments.model, scan)
    embedding = embed_scan(scan, model, arguments, session, "scan")
    embedding.save(output)
    session.say(f"written: {output} ({model.name}, fine grid {' x '.join(map(str, embedding.fine.shape[1:]))})")
    if pca is not None:
        from uae.embedding import pca_volume
        from uae.volume import write_image

        write_image(pca_volume(embedding), pca)
        session.say(f"written: {pca}")
    return 0
