"""`python -m fmxnn`."""

import sys

from fmxnn.reports.command_line import main

sys.exit(main())
