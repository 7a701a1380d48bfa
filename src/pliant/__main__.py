"""`python -m pliant` is the command `pliant`."""

from __future__ import annotations

import sys

from pliant.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
