"""`python -m fmxnn`."""

import sys

from fmxnn.reports.command_line import run

sys.exit(run())
