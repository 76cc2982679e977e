"""How much tests try that could try for ever: a little by default, more under ``make test-all``."""

import os

EVERYTHING = os.environ.get("KD_DETECTRON_TEST_ALL") == "1"


def effort(by_default: int, everything: int) -> int:
    """A number of repetitions, examples or steps."""
    return everything if EVERYTHING else by_default
