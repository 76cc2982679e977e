"""Knowledge distillation for Detectron2 detectors.

Importing this package registers the meta-architectures, backbones and weight sources with
Detectron2. Where Detectron2 is not installed, ``kd_detectron.losses`` and
``kd_detectron.distillers`` still import and run.
"""

import sys
import warnings
from importlib.util import find_spec

__version__ = "0.2.0.dev0"

# Deprecated calls inside Detectron2, which its users can do nothing about.
for _message in (
    r"`torch\.jit\.script` is deprecated",
    r"pkg_resources is deprecated as an API",
    r"torch\.meshgrid: in an upcoming release",
):
    warnings.filterwarnings("ignore", _message)

if find_spec("detectron2") is not None:
    from kd_detectron import backbones, modeling  # noqa: F401
    from kd_detectron.config import add_kd_config, get_config

    __all__ = ["add_kd_config", "get_config"]
else:

    def __getattr__(name: str):
        if name in ("add_kd_config", "get_config"):
            raise ImportError(
                f"kd_detectron.{name} needs Detectron2, which is not installed in "
                f"{sys.executable}; install it (README, Install), or activate the environment that "
                "has it"
            )
        raise AttributeError(f"module 'kd_detectron' has no attribute '{name}'")
