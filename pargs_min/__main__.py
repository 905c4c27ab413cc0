"""`python -m pargs_min` is `pargs`."""

import sys

from pargs_min.cli import main

if __name__ == "__main__":
    sys.exit(main())
