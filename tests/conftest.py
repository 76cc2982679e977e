"""For all tests: commands that run inside the test's process leave no log handlers behind."""

import logging
import sys

import pytest


@pytest.fixture(autouse=True)
def no_handlers_left_behind():
    """Detectron2's loggers write to the stdout of the test that set them up, which is closed."""
    yield
    module = sys.modules.get("detectron2.utils.logger")
    if module is None:
        return
    for name in ("detectron2", "fvcore", "kd_detectron"):
        logger = logging.getLogger(name)
        for handler in logger.handlers[:]:
            logger.removeHandler(handler)
            handler.close()
        logger.propagate = True
    module.setup_logger.cache_clear()
