"""`python -m uae` is the command `uae`."""

import sys

from uae.cli import main

if __name__ == "__main__":
    sys.exit(main())
