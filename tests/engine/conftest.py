"""A data set to train on, for all tests of the engine."""

import pytest
from tiny_training import write_dataset


@pytest.fixture
def dataset(tmp_path):
    """Six noisy images with two boxes each; returns DATASETS.COCO_FORMAT."""
    return write_dataset(tmp_path)
