from coco_files import make_cfg, make_coco, write_coco  # noqa: F401
