"""`python -m fmxnn`."""

import sys

from fmxnn.cli import main

sys.exit(main())
