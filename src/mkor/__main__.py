"""`python -m mkor` is the command `mkor`."""

import sys

from mkor.bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
