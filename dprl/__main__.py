"""``python -m dprl`` is the command ``dprl``."""

import sys

from dprl.cli import main

if __name__ == "__main__":
    sys.exit(main())
