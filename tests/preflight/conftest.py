import logging

import pytest
from coco_files import make_cfg, make_coco, write_coco  # noqa: F401


@pytest.fixture(autouse=True)
def log_reaches_caplog(monkeypatch):
    """Detectron2's ``setup_logger``, called by any test before, would keep it from there."""
    monkeypatch.setattr(logging.getLogger("kd_detectron"), "propagate", True)
