"""``python -m convnn_geo``: see :mod:`convnn_geo.cli`."""

import sys

from convnn_geo.cli import main

if __name__ == "__main__":
    sys.exit(main())
