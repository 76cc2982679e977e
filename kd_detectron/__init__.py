"""Knowledge distillation for Detectron2 detectors.

Importing this package registers the meta-architectures, backbones and weight sources with
Detectron2. Where Detectron2 is not installed, ``kd_detectron.losses`` and
``kd_detectron.distillers`` still import and run.
"""

from importlib.util import find_spec

__version__ = "0.1.0"

if find_spec("detectron2") is not None:
    from kd_detectron import backbones, modeling  # noqa: F401
    from kd_detectron.config import add_kd_config, get_config

    __all__ = ["add_kd_config", "get_config"]
