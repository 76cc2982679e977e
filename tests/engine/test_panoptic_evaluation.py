"""A distilled Panoptic FPN is trained and evaluated on panoptic data; what cannot be is refused."""

import importlib.util
import json
import multiprocessing
import signal
import sys
import time

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_panoptic_separated
from detectron2.evaluation import DatasetEvaluators, SemSegEvaluator
from PIL import Image
from tiny import NUM_CLASSES, tiny_cfg, write_tiny_teacher

from kd_detectron.engine import DistillationTrainer
from kd_detectron.engine.hooks import StopOnSignal
from kd_detectron.engine.main import main

THINGS = {k + 1: k for k in range(NUM_CLASSES)}
# Detectron2's convention: stuff class 0 stands for all things.
STUFF = {90: 1, 91: 2}
PANOPTIC = [
    *("MODEL.MASK_ON", True),
    *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3),
    *("MODEL.SEM_SEG_HEAD.CONVS_DIM", 16),
    *("MODEL.SEM_SEG_HEAD.NORM", ""),
]
# The package is in no index. This stands in for it: the files that it is given are looked at, and
# the quality is that of a perfect prediction.
PANOPTICAPI = {
    "__init__": "",
    "utils": """
import numpy as np

def id2rgb(ids):
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
""",
    "evaluation": """
import json, os

def pq_compute(gt_json, pred_json, gt_folder, pred_folder):
    for file, folder in ((gt_json, gt_folder), (pred_json, pred_folder)):
        with open(file) as opened:
            annotations = json.load(opened)["annotations"]
        assert annotations and all("segments_info" in one for one in annotations)
        assert all(os.path.isfile(os.path.join(folder, one["file_name"])) for one in annotations)
    return {part: {"pq": 1.0, "sq": 1.0, "rq": 1.0, "n": 1} for part in ("All", "Things", "Stuff")}
""",
}


@pytest.fixture
def panopticapi(tmp_path, monkeypatch):
    package = tmp_path / "site" / "panopticapi"
    package.mkdir(parents=True)
    for name, text in PANOPTICAPI.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(package.parent))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "panopticapi"]:
        del sys.modules[name]


@pytest.fixture
def dataset(tmp_path):
    """Two images, each of one thing on two kinds of stuff, registered as COCO panoptic data."""
    folders = {name: tmp_path / name for name in ("images", "panoptic", "semantic")}
    for folder in folders.values():
        folder.mkdir()
    random = np.random.default_rng(0)
    images, instances, panoptic = [], [], []
    for index in range(2):
        name, (x, y, w, h) = f"{index}.png", (20 + 10 * index, 12, 32, 28)
        pixels = random.integers(0, 255, (64, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folders["images"] / f"{index}.jpg")
        semantic = np.full((64, 96), STUFF[90], dtype=np.uint8)
        semantic[:, 48:] = STUFF[91]
        semantic[y : y + h, x : x + w] = 0
        Image.fromarray(semantic).save(folders["semantic"] / name)
        # Segment ids 1, 2 for the stuff and 3 for the thing, in the red channel.
        ids = np.where(semantic == 0, 3, semantic)
        Image.fromarray(np.stack([ids, 0 * ids, 0 * ids], axis=-1).astype(np.uint8)).save(
            folders["panoptic"] / name
        )
        images.append({"id": index, "file_name": f"{index}.jpg", "height": 64, "width": 96})
        thing = {"category_id": 1 + index, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
        polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        instances.append(thing | {"id": index + 1, "image_id": index, "segmentation": polygon})
        segments = [thing | {"id": 3}]
        for number, category in enumerate(STUFF, start=1):
            area = int((ids == number).sum())
            segments.append({"id": number, "category_id": category, "area": area, "iscrowd": 0})
        panoptic.append({"image_id": index, "file_name": name, "segments_info": segments})
    categories = [{"id": k, "name": f"thing {k}", "isthing": 1} for k in THINGS]
    stuff = [{"id": k, "name": f"stuff {k}", "isthing": 0} for k in STUFF]
    instances = {"images": images, "annotations": instances, "categories": categories}
    panoptic = {"images": images, "annotations": panoptic, "categories": categories + stuff}
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    (tmp_path / "panoptic.json").write_text(json.dumps(panoptic))
    name = f"panoptic_{tmp_path.name}"
    metadata = {
        "thing_classes": [one["name"] for one in categories],
        "stuff_classes": ["things", *(one["name"] for one in stuff)],
        "thing_dataset_id_to_contiguous_id": THINGS,
        "stuff_dataset_id_to_contiguous_id": {0: 0, **STUFF},
    }
    register_coco_panoptic_separated(
        name,
        metadata,
        str(folders["images"]),
        str(folders["panoptic"]),
        str(tmp_path / "panoptic.json"),
        str(folders["semantic"]),
        str(tmp_path / "instances.json"),
    )
    yield f"{name}_separated"
    for one in (f"{name}_separated", f"{name}_stuffonly"):
        DatasetCatalog.remove(one)
        MetadataCatalog.remove(one)


@pytest.fixture
def command(tmp_path, dataset):
    """The command line of a distilled Panoptic FPN on that data."""
    opts = [*PANOPTIC, "MODEL.META_ARCHITECTURE", "PanopticFPN"]
    cfg = tiny_cfg(
        [
            *PANOPTIC,
            *("MODEL.META_ARCHITECTURE", "DistilledPanopticFPN"),
            *("DATASETS.TRAIN", (dataset,), "DATASETS.TEST", (dataset,)),
            *("KD.DISTILLERS", ["CKD", "ReviewKD"], "KD.REVIEWKD.MID_CHANNELS", 16),
            *("KD.TEACHER.CONFIG_FILE", write_tiny_teacher(tmp_path, opts)),
            *("KD.TEACHER.WEIGHTS", "none"),
            *("SOLVER.MAX_ITER", 1, "SOLVER.STEPS", (), "OUTPUT_DIR", str(tmp_path / "run")),
        ]
    )
    (tmp_path / "run.yaml").write_text(cfg.dump())
    return ["--config-file", str(tmp_path / "run.yaml")]


def test_distilled_panoptic_fpn_trains_and_evaluates(command, tmp_path, panopticapi):
    assert main(command) == 0
    results = json.loads((tmp_path / "run" / "result.json").read_text())["results"]
    assert set(results) == {"sem_seg", "bbox", "segm", "panoptic_seg"}
    assert results["sem_seg"]["mIoU"] >= 0 and results["panoptic_seg"]["PQ"] == 100


def test_evaluators_are_those_of_the_datasets_type(dataset, tmp_path, panopticapi):
    cfg = tiny_cfg(["OUTPUT_DIR", str(tmp_path / "run")])
    assert type(DistillationTrainer.build_evaluator(cfg, dataset)) is DatasetEvaluators
    semantic = dataset.replace("_separated", "_stuffonly")
    assert type(DistillationTrainer.build_evaluator(cfg, semantic)) is SemSegEvaluator


def test_forked_processes_of_an_evaluator_can_be_terminated():
    """panopticapi leaves its pool of processes to be terminated when it is forgotten."""
    context = multiprocessing.get_context("fork")
    started = context.Event()
    hook = StopOnSignal(checkpointer=None)
    hook.before_train()
    child = context.Process(target=lambda: (started.set(), time.sleep(60)))
    try:
        child.start()
        started.wait()
        child.terminate()
        child.join(timeout=20)
        assert child.exitcode == -signal.SIGTERM
    finally:
        hook.after_train()
        child.kill()


@pytest.mark.parametrize(
    ("kind", "opts", "expected"),
    [
        ("coco_panoptic_seg", [], "panopticapi, which is not installed: pip install git+https://"),
        ("lvis", [], "the package lvis, which is not installed: pip install lvis"),
        ("cityscapes", [], "whose evaluator type is 'cityscapes'; known are coco,"),
        ("coco", ["TEST.AUG.ENABLED", "True"], "MODEL.META_ARCHITECTURE is DistilledPanopticFPN"),
    ],
)
def test_what_could_not_be_evaluated_is_refused_before_training(
    command, dataset, tmp_path, capsys, monkeypatch, kind, opts, expected
):
    find_spec = importlib.util.find_spec
    missing = ("lvis", "panopticapi")
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in missing else find_spec(name, *rest),
    )
    metadata = MetadataCatalog.get(dataset).as_dict()
    MetadataCatalog.remove(dataset)
    MetadataCatalog.get(dataset).set(**metadata | {"evaluator_type": kind})
    assert main([*command, *opts]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
