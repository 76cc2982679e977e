"""Tests on real images; collected where KD_DETECTRON_TEST_DATA names the folder that holds them.

The folder has ``coco_tiny/coco`` (COCO's layout, a few images) and ``bccd`` (COCO format).
"""

import os

import pytest

DATA = os.environ.get("KD_DETECTRON_TEST_DATA")

collect_ignore_glob = [] if DATA else ["test_*.py"]


@pytest.fixture
def datasets_folder(request, monkeypatch):
    """Points DETECTRON2_DATASETS at the test data, or at a folder in it given as parameter."""
    folder = os.path.join(DATA, getattr(request, "param", ""))
    monkeypatch.setenv("DETECTRON2_DATASETS", folder)
    return folder
