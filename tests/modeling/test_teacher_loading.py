"""Teachers from LazyConfig files: the zoo's, one's own, and those whose features cannot fit."""

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.events import EventStorage
from tiny import tiny_batch, tiny_cfg

from kd_detectron.errors import ConfigError
from kd_detectron.modeling import FrozenTeacher
from kd_detectron.modeling.teacher_loading import (
    find_teacher_config,
    load_teacher,
    teacher_config,
    zoo_configs,
)

SMALL_RCNN = """
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.model_zoo import get_config
from detectron2.modeling import SimpleFeaturePyramid, ViT
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

model = get_config("common/models/mask_rcnn_fpn.py").model
model.backbone.bottom_up.stages.depth = 18
model.backbone.bottom_up.stages.norm = "BN"
del model.backbone.bottom_up.stages["stride_in_1x1"]
model.backbone.bottom_up.stem.norm = "BN"
model.backbone.out_channels = 24
model.proposal_generator.head.in_channels = 24
model.roi_heads.num_classes = 3
model.roi_heads.box_head.input_shape = ShapeSpec(channels=24, height=7, width=7)
model.roi_heads.box_head.fc_dims = [40]
model.roi_heads.box_predictor.input_shape = ShapeSpec(channels=40)
model.roi_heads.mask_in_features = None
model.roi_heads.mask_head.input_shape = ShapeSpec(channels=24, height=14, width=14)
model.roi_heads.mask_head.conv_dims = [8]
model.pixel_mean = [1.0, 2.0, 3.0]
"""
VITDET = """
model.backbone = L(SimpleFeaturePyramid)(
    net=L(ViT)(img_size=128, patch_size=16, embed_dim=16, depth=1, num_heads=2, out_feature="last"),
    in_feature="last",
    out_channels=24,
    scale_factors=(4.0, 2.0, 1.0, 0.5),
    top_block=L(LastLevelMaxPool)(),
    square_pad=128,
)
"""


def write(folder, *lines):
    path = folder / "lazy_teacher.py"
    path.write_text("\n".join(lines))
    return str(path)


def student_cfg(config_file, distillers=("CKD", "ReviewKD"), weights="none", opts=()):
    return tiny_cfg(
        [
            *("KD.DISTILLERS", list(distillers)),
            *("KD.TEACHER.CONFIG_FILE", config_file),
            *("KD.TEACHER.WEIGHTS", weights),
            *("KD.TEACHER.OPTS", list(opts)),
            *("KD.REVIEWKD.MID_CHANNELS", 16),
        ]
    )


def train_step(cfg, batch):
    from detectron2.modeling import build_model

    torch.manual_seed(1)
    model = build_model(cfg)
    model.train()
    with EventStorage():
        losses = model(batch)
        sum(losses.values()).backward()
    return model, losses


def test_a_lazy_config_teaches(tmp_path):
    model, losses = train_step(student_cfg(write(tmp_path, SMALL_RCNN)), tiny_batch())
    assert losses["loss_ckd"] > 0 and losses["loss_reviewkd"] > 0
    assert not any(module.training for module in model.teacher.model.modules())
    assert model.teacher.model.proposal_generator is None
    assert model.teacher.model.roi_heads.num_classes == 3
    assert model.teacher.input_format == "BGR"


def test_its_checkpoint_is_loaded_whole(tmp_path):
    path = write(tmp_path, SMALL_RCNN)
    torch.manual_seed(8)
    trained = instantiate(LazyConfig.load(path).model).state_dict()
    torch.save({"model": trained}, tmp_path / "trained.pth")
    write(tmp_path, SMALL_RCNN, f"train = dict(init_checkpoint={str(tmp_path / 'trained.pth')!r})")
    for weights in (str(tmp_path / "trained.pth"), ""):
        model, input_format = load_teacher(student_cfg(path, weights=weights))
        state = model.state_dict()
        assert state.keys() == trained.keys() and input_format == "BGR"
        assert all(torch.equal(state[name], trained[name]) for name in trained)
    name = "roi_heads.box_predictor.cls_score.weight"
    broken = {**trained, name: trained[name] * float("inf")}
    torch.save({"model": broken}, tmp_path / "broken.pth")
    with pytest.raises(ConfigError, match=f"broken.pth' holds NaN or infinity in '{name}'"):
        load_teacher(student_cfg(path, weights=str(tmp_path / "broken.pth")))
    trained.pop(name)
    torch.save({"model": trained}, tmp_path / "trained.pth")
    with pytest.raises(ConfigError, match="1 keys missing .*cls_score.weight"):
        load_teacher(student_cfg(path, weights=""))


def test_channel_order_comes_from_the_model_or_from_its_images(tmp_path):
    mapper = "dataloader = dict(train=dict(mapper=dict(image_format='RGB')))"
    path = write(tmp_path, SMALL_RCNN, "model.input_format = None", mapper)
    assert load_teacher(student_cfg(path))[1] == "RGB"
    path = write(tmp_path, SMALL_RCNN, "model.input_format = 'BGR'", mapper)
    assert load_teacher(student_cfg(path))[1] == "BGR"
    path = write(tmp_path, SMALL_RCNN, "model.input_format = None")
    with pytest.raises(ConfigError, match="channel order.*model.input_format"):
        load_teacher(student_cfg(path))
    assert load_teacher(student_cfg(path, opts=["model.input_format", "RGB"]))[1] == "RGB"


def test_options_are_keys_of_the_file(tmp_path):
    path = write(tmp_path, SMALL_RCNN)
    opts = ["model.roi_heads.num_classes", 5]
    assert load_teacher(student_cfg(path, opts=opts))[0].roi_heads.num_classes == 5
    with pytest.raises(ConfigError, match="num_classes is 3|NUM_CLASSES is 3 .* 5 for the teacher"):
        train_step(student_cfg(path, opts=opts), tiny_batch())


@pytest.mark.parametrize(
    ("lines", "opts", "words"),
    [
        (["model = dict("], [], ["cannot be read", "SyntaxError"]),
        (["import no_such_module"], [], ["cannot be read", "no_such_module"]),
        (["train = dict(max_iter=1)"], [], ["no 'model'"]),
        ([SMALL_RCNN, "model.no_such_argument = 1"], [], ["cannot be built", "no_such_argument"]),
        ([SMALL_RCNN], ["MODEL.DEPTH", 18], ["MODEL.DEPTH", "LazyConfig", "did you mean model"]),
        ([SMALL_RCNN], ["model.depth"], ["KD.TEACHER.OPTS", "pairs"]),
        ([SMALL_RCNN, "model = model.backbone"], [], ["in which channel order"]),
    ],
)
def test_mistakes_are_answered_in_a_sentence(tmp_path, lines, opts, words):
    with pytest.raises(ConfigError) as error:
        load_teacher(student_cfg(write(tmp_path, *lines), opts=opts))
    for word in ("KD.TEACHER", *words):
        assert word in str(error.value), str(error.value)


def test_untrained_weights_are_refused(tmp_path):
    path = write(tmp_path, SMALL_RCNN)
    with pytest.raises(ConfigError, match="KD.TEACHER.WEIGHTS is empty.*trained teacher"):
        load_teacher(student_cfg(path, weights=""))


def test_vitdet_features_are_refused_since_it_pads_to_squares(tmp_path):
    path = write(tmp_path, SMALL_RCNN, VITDET)
    with pytest.raises(
        ConfigError, match="to multiples of 32 for the student.*to squares of 128 for the teacher"
    ):
        train_step(student_cfg(path), tiny_batch())


def test_vitdet_logits_teach(tmp_path):
    cfg = student_cfg(write(tmp_path, SMALL_RCNN, VITDET), ["CKD", "KD"])
    model, losses = train_step(cfg, tiny_batch())
    assert losses["loss_ckd"] > 0 and losses["loss_kd"] > 0
    images = model.teacher.preprocess(tiny_batch(), "BGR")
    assert images.tensor.shape[-2:] == (128, 128)
    with pytest.raises(ConfigError, match="160 pixels long.*square of 128.*INPUT.MAX_SIZE_TRAIN"):
        model.teacher.preprocess(tiny_batch(sizes=((64, 160),), boxes_per_image=(1,)), "BGR")


def test_zoo_names_exist_and_have_checkpoints():
    names = zoo_configs()
    assert "new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py" in names
    assert "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml" in names
    assert all(find_teacher_config(name) for name in names)


def test_zoo_lazy_config_is_built_as_a_teacher():
    cfg = student_cfg("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py")
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        teacher = FrozenTeacher.from_config(cfg)
    assert list(teacher.spec.strides.items())[0] == ("p2", 4)
    assert teacher.spec.num_classes == 80 and teacher.spec.box_channels == 1024


def test_teacher_by_arguments_is_the_teacher_of_the_config(tmp_path):
    path = write(tmp_path, SMALL_RCNN)
    torch.manual_seed(2)
    by_config = FrozenTeacher.from_config(student_cfg(path))
    torch.manual_seed(2)
    by_name = FrozenTeacher.from_name(path, weights="none", device="cpu")
    assert by_name.fingerprint() == by_config.fingerprint()
    assert (by_name.amp, by_name.name) == (by_config.amp, by_config.name)


def test_weights_among_the_overrides_are_those_that_are_loaded():
    cfg = student_cfg("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", weights="")
    assert teacher_config(cfg).MODEL.WEIGHTS.endswith("model_final_b275ba.pkl")
    cfg.KD.TEACHER.OPTS = ["MODEL.WEIGHTS", "mine.pth"]
    assert teacher_config(cfg).MODEL.WEIGHTS == "mine.pth"
