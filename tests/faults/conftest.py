"""Prints the table of attempts where FMXNN_ATTACK is set, as `make attack` sets it."""

import os

from attempts import TALLY, table


def pytest_terminal_summary(terminalreporter):
    if TALLY and os.environ.get("FMXNN_ATTACK"):
        terminalreporter.write_line("\n" + table())
