from coco_files import forget_new_datasets, make_cfg, make_coco, write_coco  # noqa: F401
