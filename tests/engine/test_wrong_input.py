"""Every kind of wrong input ends the command in one sentence and exit code 2, before a step.

One case of each layer goes through the whole command line, all of them under ``make test-all``;
the others go through what the command calls. The details of each check are tested beside it.
"""

import json

import pytest
import torch
from effort import EVERYTHING
from tiny import distilled_cfg, write_tiny_teacher
from torchvision.models import mobilenet_v2

from kd_detectron.data.synthetic import SYNTHETIC_CLASSES, make_synthetic
from kd_detectron.engine import main as command
from kd_detectron.errors import ConfigError

CLASSES = ["MODEL.ROI_HEADS.NUM_CLASSES", len(SYNTHETIC_CLASSES)]
SMALL = [
    *("MODEL.BACKBONE.NAME", "build_mobilenetv2_fpn_backbone"),
    *("MODEL.MOBILENETV2.WIDTH_MULT", 0.125),
    *("MODEL.FPN.OUT_CHANNELS", 16),
    *CLASSES,
]
RETINANET = [
    *("MODEL.META_ARCHITECTURE", "DistilledRetinaNet"),
    *("MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"),
    *("MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]),
    *("MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]),
    *("MODEL.RETINANET.NUM_CLASSES", len(SYNTHETIC_CLASSES)),
]
PADDED_TEACHER = f"""
from detectron2.model_zoo import get_config
model = get_config("common/models/mask_rcnn_fpn.py").model
for part in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(part)
model.backbone.bottom_up.stages.depth = 18
model.backbone.bottom_up.stages.pop("stride_in_1x1")
model.backbone.square_pad = 128
model.roi_heads.num_classes = {len(SYNTHETIC_CLASSES)}
model.input_format = "BGR"
"""
OWN_DISTILLER = """
from kd_detectron.distillers import DISTILLER_REGISTRY, Distiller

@DISTILLER_REGISTRY.register()
class OfWrongInput(Distiller):
    def __init__(self, student, teacher, *, factor=1.0):
        super().__init__()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds ``data``, ``run.yaml``, a config that works, and its ``teacher.yaml``."""
    folder = tmp_path_factory.mktemp("wrong_input")
    data = make_synthetic(folder / "data", 3, 1, image_size=(64, 64))
    cfg = distilled_cfg(folder, opts=[*SMALL, "DATASETS.TRAIN", ("shapes",)])
    cfg.DATASETS.COCO_FORMAT = [["shapes", str(data / "train.json"), str(data / "train")]]
    (folder / "run.yaml").write_text(cfg.dump())
    write_tiny_teacher(folder, SMALL)
    return folder


# ---- what is written for a case: functions of the case's folder and the module's ----


def data(change=lambda content: None, *opts):
    """Trains on the images with other annotations: changed in place, or another text."""

    def write(case, folder):
        content = json.loads((folder / "data" / "train.json").read_text())
        changed = change(content)
        file = case / "annotations.json"
        file.write_text(changed if isinstance(changed, str) else json.dumps(content))
        return ["DATASETS.COCO_FORMAT", [["shapes", file, folder / "data" / "train"]], *opts]

    return write


def in_all(part, **values):
    """A change of all entries: these values, or without the keys whose value is None."""

    def change(content):
        for entry in content[part]:
            entry.update(values)
            for key in [key for key, value in values.items() if value is None]:
                del entry[key]

    return change


def reversed_classes(content):
    for category in content["categories"]:
        category["id"] = len(SYNTHETIC_CLASSES) + 1 - category["id"]


def other_order_in_the_test_set(case, folder):
    *_, entries = data(reversed_classes)(case, folder)
    own = ["shapes", folder / "data" / "train.json", folder / "data" / "train"]
    entries[0][0] = "other_shapes"
    opts = ["DATASETS.COCO_FORMAT", [own, *entries]]
    return [*opts, "DATASETS.TEST", ("other_shapes",)]


def other_order_of_the_teacher(case, folder):
    *_, entries = data(reversed_classes)(case, folder)
    trained_on = ["DATASETS.COCO_FORMAT", entries, "DATASETS.TRAIN", ("shapes",)]
    return teacher([*SMALL, *map_paths(trained_on)])(case, folder)


def missing_images(case, folder):
    (case / "images").mkdir()
    entry = ["shapes", folder / "data" / "train.json", case / "images"]
    return ["DATASETS.COCO_FORMAT", [entry]]


def teacher(opts, weights="none", distillers=("CKD", "ReviewKD")):
    """The student with another teacher."""

    def write(case, folder):
        return [
            *("KD.TEACHER.CONFIG_FILE", write_tiny_teacher(case, opts)),
            *("KD.TEACHER.WEIGHTS", weights, "KD.DISTILLERS", list(distillers)),
        ]

    return write


def padded_teacher(case, folder):
    (case / "teacher.py").write_text(PADDED_TEACHER)
    return ["KD.TEACHER.CONFIG_FILE", case / "teacher.py"]


def no_detector(case, folder):
    (case / "teacher.py").write_text("train = dict(max_iter=1)")
    return ["KD.TEACHER.CONFIG_FILE", case / "teacher.py"]


def own_distiller(case, folder):
    (case / "own.py").write_text(OWN_DISTILLER)
    options = "{DISTILLERS: [OfWrongInput], OFWRONGINPUT: {FACTR: 2}}"
    (case / "own.yaml").write_text(f"_BASE_: {folder / 'run.yaml'}\nKD: {options}\n")
    return ["--import", case / "own.py", "--config-file", case / "own.yaml"]


class RunsCode:
    """What a malicious checkpoint holds: unpickling it would end the test."""

    def __reduce__(self):
        return (pytest.fail, ("code of a checkpoint ran",))


CHECKPOINTS = {
    "truncated": lambda file: file.write_bytes(b"PK\x03\x04" + bytes(100)),
    "picture": lambda file: file.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)),
    "text": lambda file: file.write_text("<html>404 not found</html>"),
    "folder": lambda file: file.mkdir(),
    "missing": lambda file: None,
    "code": lambda file: torch.save({"model": {"a": torch.zeros(1)}, "x": RunsCode()}, file),
    "other": lambda file: torch.save({"nothing.weight": torch.zeros(3)}, file),
    # Of the box predictor alone, its weight in another shape.
    "half": lambda file: torch.save(
        {
            f"roi_heads.box_predictor.cls_score.{name}": torch.zeros(CLASSES[1] + 1)
            for name in ("bias", "weight")
        },
        file,
    ),
    "width": lambda file: torch.save(mobilenet_v2(width_mult=0.25).state_dict(), file),
}


def weights(key, kind):
    def write(case, folder):
        CHECKPOINTS[kind](case / "weights.pth")
        return [key, case / "weights.pth"]

    return write


def finished_run(*args):
    """A folder that holds a run of the config as it is."""

    def write(case, folder):
        (case / "run").mkdir()
        (case / "run" / "last_checkpoint").write_text("model_0000001.pth")
        (case / "run" / "config.yaml").write_text((folder / "run.yaml").read_text())
        return list(args)

    return write


def map_paths(value):
    """The same with paths as text."""
    if isinstance(value, list | tuple):
        return type(value)(map(map_paths, value))
    return value if isinstance(value, int | float) else str(value)


CASES = {
    "no such config": (["--config-file", "ckd_rcnn_r101_r81.yaml"], ["ckd_rcnn_r101_r18.yaml"]),
    "no such key": (["KD.CKD.TEMPRATURE", 1], ["KD.CKD.TEMPERATURE"]),
    "type": (["KD.CKD.TEMPERATURE", "warm"], ["KD.CKD.TEMPERATURE", "warm"]),
    "pairs": (["SOLVER.MAX_ITER"], ["pairs of KEY VALUE"]),
    "no such import": (["--import", "nowhere.py"], ["--import 'nowhere.py'"]),
    "distiller": (["KD.DISTILLERS", ["Ckdd"]], ["KD.DISTILLERS", "Ckdd", "CKD"]),
    "distiller twice": (["KD.DISTILLERS", ["CKD", "CKD"]], ["KD.DISTILLERS", "once"]),
    "plain detector": (["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"], ["distils nothing"]),
    "no such detector": (["MODEL.META_ARCHITECTURE", "DistilledRCN"], ["DistilledRCNN"]),
    "backbone": (["MODEL.BACKBONE.NAME", "build_resnet_fpm_backbone"], ["build_resnet_fpn_backb"]),
    "heads": (["MODEL.ROI_HEADS.NAME", "StandardHeads"], ["MODEL.ROI_HEADS.NAME", "StandardROI"]),
    "mask head": (["MODEL.ROI_MASK_HEAD.NAME", "Mask"], ["MODEL.ROI_MASK_HEAD.NAME is 'Mask'"]),
    "option": (own_distiller, ["FACTR", "did you mean KD.OFWRONGINPUT.FACTOR"]),
    "triple": (["KD.CKD.TRIPLE", "tsx"], ["KD.CKD.TRIPLE", "tsx", "tss"]),
    "triple without meaning": (["KD.CKD.TRIPLE", "tst"], ["KD.CKD.TRIPLE", "tst", "fixed"]),
    "form": (
        ["KD.DISTILLERS", ["BicKD"], "KD.BICKD.FORM", "sideways"],
        ["KD.BICKD.FORM", "sideways", "orthogonal"],
    ),
    "weight below 0": (["KD.CKD.WEIGHT", -1.0], ["KD.CKD.WEIGHT is -1.0"]),
    "weight not finite": (["KD.CKD.WEIGHT", "1e999"], ["KD.CKD.WEIGHT is inf"]),
    "temperature 0": (["KD.CKD.TEMPERATURE", 0.0], ["KD.CKD.TEMPERATURE", "0.0"]),
    "group size": (["KD.CKD.GROUP_SIZE", -4], ["KD.CKD.GROUP_SIZE", "-4"]),
    "schedule": (["KD.SCHEDULE.DECAY", "step"], ["KD.SCHEDULE.DECAY is 'step'", "cosine"]),
    "schedule below 0": (["KD.SCHEDULE.STOP_ITER", -1], ["KD.SCHEDULE.STOP_ITER is -1"]),
    "no teacher": (["KD.TEACHER.CONFIG_FILE", ""], ["KD.TEACHER.CONFIG_FILE is empty"]),
    "no such teacher": (
        ["KD.TEACHER.CONFIG_FILE", "COCO-Detection/faster_rcnn_R_101_FPN_3.yaml"],
        ["KD.TEACHER.CONFIG_FILE", "faster_rcnn_R_101_FPN_3x.yaml"],
    ),
    "teacher's key": (["KD.TEACHER.OPTS", ["MODEL.DEPHT", 1]], ["KD.TEACHER.OPTS", "DEPHT"]),
    "no detector": (no_detector, ["KD.TEACHER.CONFIG_FILE", "no 'model'"]),
    "untrained teacher": (teacher(SMALL, ""), ["KD.TEACHER.WEIGHTS is empty", "trained teacher"]),
    "teacher's classes": (
        teacher([*SMALL, "MODEL.ROI_HEADS.NUM_CLASSES", 5]),
        [f"MODEL.ROI_HEADS.NUM_CLASSES is {CLASSES[1]} for the student and 5 for the teacher"],
    ),
    "teacher's order": (
        other_order_of_the_teacher,
        ["class 0 is 'disc'", f"'{SYNTHETIC_CLASSES[-1]}'"],
    ),
    "teacher's levels": (
        teacher([*RETINANET, "MODEL.META_ARCHITECTURE", "RetinaNet"], distillers=["ReviewKD"]),
        ["KD.TEACHER.CONFIG_FILE", "p2 (stride 4)", "p7 (stride 128)"],
    ),
    "teacher's box heads": (
        teacher(
            [
                *(*SMALL, "MODEL.ROI_HEADS.NAME", "CascadeROIHeads"),
                *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
            ]
        ),
        ["KD.DISTILLERS", "CKD", "Cascade"],
    ),
    "teacher's padding": (padded_teacher, ["padded to multiples of 32", "to squares of 128"]),
    "student without box head": (RETINANET, ["KD.DISTILLERS", "CKD", "RetinaNet"]),
    "augmentation": (
        [*RETINANET, "TEST.AUG.ENABLED", True],
        ["TEST.AUG.ENABLED", "DistilledRetinaNet"],
    ),
    **{
        f"{kind} of {key}": (weights(key, kind), [f"{key} '", "weights.pth'", *words])
        for key in ("KD.TEACHER.WEIGHTS", "MODEL.WEIGHTS")
        for kind, words in {
            "truncated": ["truncated"],
            "picture": ["no checkpoint"],
            "text": ["no checkpoint"],
            "folder": ["is a folder"],
            "missing": ["does not exist"],
            "code": ["other objects than tensors"],
            "other": ["nothing in common"],
        }.items()
    },
    "half a teacher": (weights("KD.TEACHER.WEIGHTS", "half"), ["keys missing", "another shape"]),
    "width": (weights("MODEL.WEIGHTS", "width"), ["MODEL.MOBILENETV2.WIDTH_MULT"]),
    "no download": (
        ["MODEL.WEIGHTS", "http://127.0.0.1:9/weights.pkl"],
        ["MODEL.WEIGHTS", "http://127.0.0.1:9/weights.pkl", "by hand"],
    ),
    "precision": (
        ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "fp16"],
        ["SOLVER.AMP.PRECISION is 'fp16'", "cpu", "bf16"],
    ),
    "checkpoints": (
        ["SOLVER.CHECKPOINT_MAX_TO_KEEP", -1],
        ["SOLVER.CHECKPOINT_MAX_TO_KEEP is -1"],
    ),
    "accumulation": (["SOLVER.ACCUMULATE_STEPS", 0], ["SOLVER.ACCUMULATE_STEPS is 0"]),
    "batch": (["SOLVER.IMS_PER_BATCH", 0], ["SOLVER.IMS_PER_BATCH is 0"]),
    "sampler": (["DATALOADER.SAMPLER_TRAIN", "Random"], ["DATALOADER.SAMPLER_TRAIN is 'Random'"]),
    "no such dataset": (["DATASETS.TRAIN", ("shaps",)], ["DATASETS.TRAIN", "did you mean shapes"]),
    "no dataset": (["DATASETS.TRAIN", ()], ["DATASETS.TRAIN is empty"]),
    "entry": (["DATASETS.COCO_FORMAT", [["shapes", "a.json"]]], ["DATASETS.COCO_FORMAT", "three"]),
    "name taken": (
        ["DATASETS.COCO_FORMAT", [["coco_2017_train", "a.json", "images"]]],
        ["DATASETS.COCO_FORMAT names 'coco_2017_train'", "another name"],
    ),
    "no annotation file": (
        ["DATASETS.COCO_FORMAT", [["shapes", "nowhere.json", "images"]]],
        ["DATASETS.TRAIN 'shapes'", "nowhere.json' does not exist", "DETECTRON2_DATASETS"],
    ),
    "broken JSON": (data(lambda content: '{"images": ['), ["not readable as JSON"]),
    "no COCO format": (data(lambda content: "[]"), ["not in COCO format"]),
    "no images": (data(lambda content: content["images"].clear()), ["lists no images"]),
    "no categories": (data(lambda content: content["categories"].clear()), ["no categories"]),
    "no annotations": (data(lambda content: content["annotations"].clear()), ["no usable"]),
    "only crowds": (data(in_all("annotations", iscrowd=1)), ["no usable", "crowds"]),
    "empty boxes": (data(in_all("annotations", bbox=[3, 3, 0, -1])), ["no usable", "have no area"]),
    "outside": (data(in_all("annotations", bbox=[900, 3, 5, 5])), ["no usable", "outside"]),
    "category ids": (data(in_all("annotations", category_id=77)), ["category ids 77"]),
    "class count": (
        CLASSES[:1] + [9],
        [f"{CLASSES[1]} classes", "MODEL.ROI_HEADS.NUM_CLASSES is 9", f"to {CLASSES[1]}"],
    ),
    "class order": (other_order_in_the_test_set, ["DATASETS.TEST 'other_shapes'", "same order"]),
    "images missing": (missing_images, ["3 of 3 images are not on disk", "/images/"]),
    "malformed": (data(in_all("annotations", bbox=[1, 2])), ["bbox [1, 2]", "width, height"]),
    "ids twice": (data(in_all("images", id=1)), ["several images have the same id"]),
    "masks": (
        data(in_all("annotations", segmentation=None), "MODEL.MASK_ON", True),
        ["MODEL.MASK_ON is True", "no 'segmentation'"],
    ),
    "format of masks": (
        data(
            in_all("annotations", segmentation={"size": [64, 64], "counts": "a"}),
            "MODEL.MASK_ON",
            True,
        ),
        ["INPUT.MASK_FORMAT is 'polygon'", "bitmask"],
    ),
    "keypoints": (["MODEL.KEYPOINT_ON", True], ["MODEL.KEYPOINT_ON is True", "no 'keypoints'"]),
    "folder of a run": (finished_run(), ["OUTPUT_DIR", "already holds a run", "--resume"]),
    "folder of another run": (
        finished_run("--resume", "KD.DISTILLERS", ["KD"]),
        ["KD.DISTILLERS was ['CKD', 'ReviewKD'] and is ['KD']", "OUTPUT_DIR"],
    ),
}


# One of each layer: finding and reading a config, imports, architecture, parts, distillers and
# their options, teacher, fit of both models, checkpoints, torchvision's weights, precision, data,
# resume.
BY_COMMAND = (
    "no such config",
    "type",
    "no such import",
    "plain detector",
    "heads",
    "distiller",
    "option",
    "no such teacher",
    "teacher's classes",
    "truncated of KD.TEACHER.WEIGHTS",
    "width",
    "precision",
    "broken JSON",
    "class order",
    "folder of another run",
)


@pytest.fixture
def arguments_of(folder, tmp_path, monkeypatch):
    """Returns a function that writes a case's files and gives the arguments of its command."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))

    def arguments(name):
        given, _ = CASES[name]
        given = given(tmp_path, folder) if callable(given) else given
        parts = ["--config-file", folder / "run.yaml", *given, "OUTPUT_DIR", tmp_path / "run"]
        return [str(map_paths(part)) for part in parts]

    return arguments


@pytest.mark.parametrize("name", CASES if EVERYTHING else BY_COMMAND)
def test_command_ends_in_one_sentence_and_exit_code_2(name, arguments_of, tmp_path, capsys):
    assert command.main(arguments_of(name)) == 2
    said = capsys.readouterr()
    (error,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert said.err.endswith(error + "\n")
    for word in CASES[name][1]:
        assert word in error, error
    assert "Traceback" not in said.out + said.err
    assert not list((tmp_path / "run").glob("*.pth")), "it trained"


@pytest.mark.parametrize("name", [name for name in CASES if name not in BY_COMMAND])
def test_what_the_command_calls_refuses_in_one_sentence(name, arguments_of, tmp_path, monkeypatch):
    # Detectron2's set-up of logs takes longer than everything up to the refusal.
    monkeypatch.setattr(command, "default_setup", lambda cfg, args: None)
    with pytest.raises(ConfigError) as refusal:
        command.run(command.argument_parser().parse_args(arguments_of(name)))
    for word in CASES[name][1]:
        assert word in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not list((tmp_path / "run").glob("*.pth")), "it trained"


def test_config_of_the_cases_is_sound(folder, capsys):
    assert command.main(["--config-file", str(folder / "run.yaml"), "--check"]) == 0
    assert "ready to train" in capsys.readouterr().out
