"""``python -m ilnas`` is the command ``ilnas``."""

import sys

from ilnas.cli import main

if __name__ == "__main__":
    sys.exit(main())
