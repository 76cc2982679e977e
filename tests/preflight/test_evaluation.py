"""An evaluation that would fail after the training is refused before it."""

import pytest
from tiny import tiny_cfg

from kd_detectron.errors import ConfigError
from kd_detectron.preflight.evaluation import check_evaluation


@pytest.mark.parametrize(
    "opts",
    [
        ["MODEL.META_ARCHITECTURE", "PanopticFPN"],
        ["MODEL.META_ARCHITECTURE", "RetinaNet"],
        ["MODEL.KEYPOINT_ON", True],
        ["MODEL.LOAD_PROPOSALS", True],
    ],
)
def test_test_time_augmentation_that_detectron2_does_not_have_is_refused(opts):
    check_evaluation(tiny_cfg(opts))
    with pytest.raises(ConfigError, match=f"TEST.AUG.ENABLED is True.*{opts[0]} is {opts[1]}"):
        check_evaluation(tiny_cfg([*opts, "TEST.AUG.ENABLED", True]))
    check_evaluation(tiny_cfg(["TEST.AUG.ENABLED", True]))
