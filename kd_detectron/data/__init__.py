"""Datasets: the user's own in COCO format, the training loader, a synthetic set.

Where Detectron2 is not installed, the synthetic set is all that there is.
"""

from importlib.util import find_spec

from kd_detectron.data.synthetic import SYNTHETIC_CLASSES, make_synthetic

__all__ = ["SYNTHETIC_CLASSES", "make_synthetic"]

if find_spec("detectron2") is not None:
    from kd_detectron.data.coco_format import register_coco_format
    from kd_detectron.data.loader import (
        ResumableLoader,
        build_lazy_train_loader,
        build_train_loader,
    )

    __all__ += [
        "ResumableLoader",
        "build_lazy_train_loader",
        "build_train_loader",
        "register_coco_format",
    ]
