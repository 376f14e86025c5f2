"""``python -m phenoseq.cli``."""

import sys

from phenoseq.cli import main

if __name__ == "__main__":
    sys.exit(main())
