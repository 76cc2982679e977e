"""Students that Detectron2 lacks; importing this registers them with Detectron2.

``MODEL.BACKBONE.NAME`` is then also ``build_mobilenetv2_fpn_backbone``,
``build_timm_fpn_backbone`` or ``build_torchvision_fpn_backbone``, and for RetinaNet
``build_retinanet_mobilenetv2_fpn_backbone`` and so on.
"""

from kd_detectron.backbones.config import BACKBONE_NODES, add_backbone_config
from kd_detectron.backbones.mobilenetv2 import MobileNetV2
from kd_detectron.backbones.timm_fpn import TimmBackbone
from kd_detectron.backbones.torchvision_fpn import TorchvisionBackbone

__all__ = [
    "BACKBONE_NODES",
    "MobileNetV2",
    "TimmBackbone",
    "TorchvisionBackbone",
    "add_backbone_config",
]
