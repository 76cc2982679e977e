"""The config nodes of this project's backbones, under ``MODEL``."""

from detectron2.config import CfgNode

BACKBONE_NODES = {
    f"build_{kind}{node.lower()}_fpn_backbone": node
    for node in ("MOBILENETV2", "TIMM", "TORCHVISION")
    for kind in ("", "retinanet_")
}
"""The node under ``MODEL`` of each ``MODEL.BACKBONE.NAME`` that this project adds."""


def add_backbone_config(cfg: CfgNode) -> None:
    """Adds the nodes, with their defaults, to a Detectron2 config, in place."""
    cfg.MODEL.MOBILENETV2 = CfgNode(
        {
            # Factor on the number of channels of every layer; torchvision has weights for 1.0.
            "WIDTH_MULT": 1.0,
        }
    )
    cfg.MODEL.TIMM = CfgNode(
        {
            # A name of timm.list_models(), such as "mobilenetv3_large_100".
            "NAME": "",
            # Start from timm's weights; only without MODEL.WEIGHTS.
            "PRETRAINED": True,
        }
    )
    cfg.MODEL.TORCHVISION = CfgNode(
        {
            # A name of torchvision.models.list_models(), such as "efficientnet_b0"; its weights are
            # MODEL.WEIGHTS "torchvision://efficientnet_b0".
            "NAME": "",
        }
    )
