"""Run folders as a training leaves them, with numbers that the tests choose."""

import json

import pytest
from detectron2.config import get_cfg

from kd_detectron.config import add_kd_config


@pytest.fixture
def write_run(tmp_path):
    """Returns a function that writes a run folder and returns its path."""

    def write(
        name,
        *,
        distillers=(),
        ap=None,
        mask_ap=None,
        depth=18,
        teacher="COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml",
        seed=0,
        opts=(),
        metrics=(),
        result=True,
        seconds=3600.0,
        iterations=100,
    ):
        cfg = get_cfg()
        add_kd_config(cfg)
        cfg.MODEL.META_ARCHITECTURE = "DistilledRCNN"
        cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.DEPTH = depth
        cfg.MODEL.MASK_ON = mask_ap is not None
        cfg.DATASETS.TEST = ("coco_2017_val",)
        cfg.KD.DISTILLERS = list(distillers)
        cfg.KD.TEACHER.CONFIG_FILE = teacher
        cfg.SEED = seed
        cfg.merge_from_list(list(opts))
        folder = tmp_path / name
        folder.mkdir()
        cfg.OUTPUT_DIR = str(folder)
        (folder / "config.yaml").write_text(cfg.dump())
        (folder / "metrics.json").write_text("".join(json.dumps(m) + "\n" for m in metrics))
        if result:
            results = {}
            for task, values in (("bbox", ap), ("segm", mask_ap)):
                if values is not None:
                    metrics_of_task = ("AP", "AP50", "AP75", "APs", "APm", "APl")
                    results[task] = dict(zip(metrics_of_task, values, strict=False))
            record = {
                "results": results,
                "iterations": iterations,
                "seconds": seconds,
                "student_parameters": 10,
                "teacher_parameters": 20,
                "seed": seed,
                "config_name": f"{name}.yaml",
                "finished": True,
            }
            (folder / "result.json").write_text(json.dumps(record))
        return folder

    return write
