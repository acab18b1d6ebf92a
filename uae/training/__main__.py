"""`python -m uae.training ...` is `uae train ...`; the form that torchrun starts."""

import sys

from uae.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
