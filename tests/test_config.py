"""Configs: every file loads, resolves its teacher and builds; mistakes are answered plainly."""

import functools
import inspect
import os

import pytest
import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import GeneralizedRCNN, build_model
from tiny import MAIN_ROWS, distilled_cfg

from kd_detectron import add_kd_config, get_config
from kd_detectron.config import config_dir, find_config, list_configs, load_run_config
from kd_detectron.distillers import CKD, DISTILLER_REGISTRY, KD, Distiller
from kd_detectron.errors import ConfigError, did_you_mean
from kd_detectron.modeling import DistilledRCNN
from kd_detectron.modeling.build import check_weights
from kd_detectron.modeling.teacher_loading import teacher_config
from kd_detectron.preflight.resume import check_same_run
from kd_detectron.runs.files import flatten
from kd_detectron.runs.groups import LATER_KEYS, NOT_THE_EXPERIMENT

DEFAULTS = {
    "CKD": {"WEIGHT": 0.1, "TEMPERATURE": 1.0, "TRIPLE": "tss", "GROUP_SIZE": 0, "CHUNK_SIZE": 0},
    "ReviewKD": {"WEIGHT": 1.0, "MID_CHANNELS": 256, "USE_ACT_CHECKPOINT": True},
    "KD": {"WEIGHT": 1.0, "TEMPERATURE": 1.0},
    "DKD": {"WEIGHT": 1.0, "ALPHA": 1.0, "BETA": 0.25, "TEMPERATURE": 1.0},
    "FitNet": {"WEIGHT": 1.0, "ADAPTER": True},
    "FGFI": {"WEIGHT": 0.01, "PSI": 0.5},
    "DCD": {"WEIGHT": 1.0, "EMBED_DIM": 128, "CONSISTENCY_WEIGHT": 0.5},
    "BicKD": {
        "WEIGHT": 1.0,
        "TEMPERATURE": 1.0,
        "CONTRAST_TEMPERATURE": 0.1,
        "CONTRAST_WEIGHT": 1.0,
        "FORM": "contrastive",
    },
    "SupCon": {"WEIGHT": 1.0, "TEMPERATURE": 0.1, "EMBED_DIM": 128},
    "CRD": {"WEIGHT": 1.0, "TEMPERATURE": 0.1, "EMBED_DIM": 128},
}


def test_the_24_rows_of_the_main_job_are_there():
    assert len(MAIN_ROWS) == 24 and set(MAIN_ROWS) <= set(list_configs())


@pytest.mark.parametrize("name", list_configs())
def test_every_config_builds_with_its_teacher(name):
    # On the meta device shapes are real and memory is not: seconds for all of them.
    cfg = get_config(name, ["MODEL.DEVICE", "meta", "KD.TEACHER.WEIGHTS", "none"])
    with torch.device("meta"):
        model = build_model(cfg)
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",)
    if name.startswith("baseline"):
        assert not hasattr(model, "teacher")
        return
    assert set(model.distillers) == set(cfg.KD.DISTILLERS)
    if not cfg.KD.DISTILLERS:  # the teacher is freed after its parts were inherited
        assert cfg.KD.TEACHER.INHERIT and model.teacher is None
        return
    if isinstance(model, DistilledRCNN):
        assert isinstance(model, GeneralizedRCNN)
    resnet_101 = 42e6
    parameters = model.teacher.num_parameters
    assert parameters > resnet_101 if "r101" in name else parameters > 25e6


@pytest.mark.parametrize("name", list_configs())
def test_teacher_of_every_config_is_in_the_model_zoo(name):
    from detectron2 import model_zoo

    teacher = get_config(name).KD.TEACHER.CONFIG_FILE
    if not name.startswith("baseline"):
        assert model_zoo.get_checkpoint_url(teacher).endswith(".pkl")


@pytest.mark.parametrize("name", list_configs())
def test_channel_order_mean_and_std_of_every_student_agree(name):
    cfg = get_config(name)
    mean, std = list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD)
    if cfg.MODEL.WEIGHTS.startswith("torchvision://"):
        assert cfg.INPUT.FORMAT == "RGB"
        assert mean == [123.675, 116.28, 103.53] and std == [58.395, 57.12, 57.375]
    else:
        assert "ImageNetPretrained/MSRA" in cfg.MODEL.WEIGHTS and cfg.INPUT.FORMAT == "BGR"
        assert mean == [103.53, 116.28, 123.675] and std == [1.0, 1.0, 1.0]


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def test_no_key_of_a_leaf_repeats_the_value_of_its_base():
    for path in config_dir().rglob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        if "_BASE_" in content and path.parent.name != "_base_":
            base = CfgNode.load_yaml_with_base(str(path.parent / content.pop("_BASE_")))
            inherited = dict(leaves(base))
            repeated = [key for key, value in leaves(content) if inherited.get(key) == value]
            assert not repeated, path


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_default_options_of_the_methods_do_not_change(name):
    cfg = get_cfg()
    add_kd_config(cfg)
    assert dict(cfg.KD[name.upper()]) == DEFAULTS[name]


def test_tables_know_what_a_run_did_that_is_older_than_a_key():
    stock, cfg = get_cfg(), get_cfg()
    add_kd_config(cfg)
    defaults, stock = flatten(cfg), flatten(stock)
    assert {key: defaults[key] for key in LATER_KEYS} == LATER_KEYS
    first = ("KD.ENABLED", "KD.DISTILLERS", "KD.SCHEDULE.", "DATASETS.COCO_FORMAT")
    first += tuple(f"KD.TEACHER.{key}" for key in ("CONFIG_FILE", "WEIGHTS", "OPTS", "AMP"))
    first += ("SOLVER.AMP.PRECISION", "SOLVER.ACCUMULATE_STEPS")
    of_use = tuple(f"KD.{name.upper()}." for name, _ in DISTILLER_REGISTRY)
    of_use += ("MODEL.MOBILENETV2.", "MODEL.TIMM.", "MODEL.TORCHVISION.")
    new = {
        key
        for key in defaults.keys() - stock.keys() - NOT_THE_EXPERIMENT
        if not key.startswith(first + of_use)
    }
    assert new == LATER_KEYS.keys(), "add the new key to LATER_KEYS of kd_detectron/runs/groups.py"


@pytest.fixture
def register():
    """Registers distillers, as a user's imported file does, until the test ends."""
    before = {name for name, _ in DISTILLER_REGISTRY}
    yield DISTILLER_REGISTRY.register
    unregister(*({name for name, _ in DISTILLER_REGISTRY} - before))


def unregister(*names):
    for name in names:
        DISTILLER_REGISTRY._obj_map.pop(name)


class Scaled(Distiller):
    """A distiller of a user's, with two options."""

    default_weight = 0.5
    requires = frozenset({"logits"})

    def __init__(self, channels=3, *, factor=1.0, powers=(1, 2)):
        super().__init__()
        self.factor, self.powers = factor, powers

    def forward(self, context):
        return {"loss_scaled": context.student.logits.square().mean() * self.factor}


def test_a_distiller_from_elsewhere_has_a_node_and_is_built_from_it(register, tmp_path):
    register(Scaled)
    cfg = distilled_cfg(tmp_path, ["Scaled", "CKD"])
    assert dict(cfg.KD.SCALED) == {"WEIGHT": 0.5, "FACTOR": 1.0, "POWERS": (1, 2)}
    cfg.merge_from_list(["KD.SCALED.WEIGHT", "2.5", "KD.SCALED.FACTOR", "3.0"])
    (tmp_path / "own.yaml").write_text(cfg.dump())
    cfg = get_config(str(tmp_path / "own.yaml"), ["KD.SCALED.POWERS", "[3]"])
    model = build_model(cfg)
    assert model.distillation_weights == {"Scaled": 2.5, "CKD": 0.1}
    assert (model.distillers["Scaled"].factor, model.distillers["Scaled"].powers) == (3.0, (3,))


def test_a_distiller_registered_after_the_config_was_made_has_its_defaults(register, tmp_path):
    cfg = distilled_cfg(tmp_path, ["Scaled"])
    register(Scaled)
    model = build_model(cfg)
    assert model.distillation_weights == {"Scaled": 0.5}
    cfg.KD.SCALED = CfgNode({"FACTR": 3.0})
    with pytest.raises(ConfigError, match="KD.SCALED has no option FACTR; did you mean FACTOR"):
        build_model(cfg)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("KD.SCALED.FACTR", "; did you mean KD.SCALED.FACTOR"),
        # Positional: sized by the two models.
        ("KD.SCALED.CHANNELS", ", which is no config key"),
        ("KD.SCALD.FACTOR", "no node KD.SCALD; did you mean KD.SCALED.FACTOR.* --import FILE.py"),
    ],
)
def test_wrong_options_of_a_distiller_from_elsewhere_are_refused(register, tmp_path, key, said):
    register(Scaled)
    with pytest.raises(ConfigError, match=f"the command line sets {key}.*{said}"):
        get_config("ckd_rcnn_r101_r18.yaml", [key, 2.0])
    content = functools.reduce(lambda value, part: {part: value}, reversed(key.split(".")), 2.0)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=f"own.yaml sets {key.rpartition('.')[0]}"):
        get_config(str(tmp_path / "own.yaml"))


def test_config_of_a_run_is_read_without_the_file_of_its_distiller(register, tmp_path):
    register(Scaled)
    cfg = distilled_cfg(tmp_path, ["Scaled"])
    unregister("Scaled")
    # As runs of earlier versions have it.
    cfg.KD.OPTIONS = CfgNode()
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert load_run_config(tmp_path).KD.SCALED.FACTOR == 1.0
    # Such a run can teach as well.
    teacher = ["KD.TEACHER.CONFIG_FILE", str(tmp_path / "config.yaml")]
    cfg = get_config("ckd_rcnn_r101_r18.yaml", [*teacher, "KD.TEACHER.WEIGHTS", "none"])
    assert teacher_config(cfg).KD.SCALED.FACTOR == 1.0


def test_changed_option_of_a_users_distiller_makes_another_run(register, tmp_path):
    register(Scaled)
    cfg = distilled_cfg(tmp_path, ["Scaled"], ["OUTPUT_DIR", str(tmp_path)])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    cfg.KD.SCALED.WEIGHT = 3.0
    assert check_same_run(cfg) == ["KD.SCALED.WEIGHT was 0.5 and is 3.0"]
    cfg.KD.SCALED.FACTOR = 4.0
    with pytest.raises(ConfigError, match="KD.SCALED.FACTOR was 1.0 and is 4.0"):
        check_same_run(cfg)


def named(name, **options):
    """A distiller of this name, whose options have these defaults."""
    code = ", ".join(["self", "*" if options else "", *(f"{key}={key}" for key in options)])
    scope = dict(options)
    exec(f"def __init__({code}): pass", scope)
    return type(name, (Distiller,), {"__init__": scope["__init__"]})


@pytest.mark.parametrize(
    ("distiller", "said"),
    [
        (
            named("ReviewKd"),
            "'ReviewKd' cannot be registered: .* KD.REVIEWKD already belongs to ReviewKD",
        ),
        (named("Teacher"), "'Teacher' cannot be registered: .* KD.TEACHER"),
        (named("Own", weight=1.0), "option 'weight', but KD.OWN.WEIGHT is taken"),
        (named("Own", of={1}), r"the option 'of' of the distiller 'Own' has default \{1\}"),
        (named("Own", of=inspect.Parameter.empty), "'of' of the distiller 'Own' has no default"),
    ],
)
def test_distiller_that_can_have_no_node_is_refused(register, distiller, said):
    register(distiller)
    with pytest.raises(ConfigError, match=said):
        add_kd_config(get_cfg())


def test_configs_are_found_by_bare_name_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert os.path.isfile(find_config("ckd_rcnn_r101_r18.yaml"))
    assert find_config("ckd_rcnn_r101_r18") == find_config("ckd_rcnn_r101_r18.yaml")
    own = tmp_path / "own.yaml"
    own.write_text("VERSION: 2\n")
    assert find_config(str(own)) == str(own)


@pytest.mark.parametrize(
    ("name", "opts", "words"),
    [
        ("ckd_rcnn_r101_r81.yaml", [], ["ckd_rcnn_r101_r18.yaml", "did you mean"]),
        ("/home/me/ckd_rcnn_r101_r81.yaml", [], ["ckd_rcnn_r101_r18.yaml", "did you mean"]),
        ("bccd/small_ckd_r18.yaml", [], ["bccd/small_ckd_reviewkd_r18.yaml", "did you mean"]),
        ("", [], ["--config-file", "ckd_rcnn_r101_r18.yaml"]),
        ("ckd_rcnn_r101_r18.yaml", ["KD.CKD.TEMPRATURE", 1], ["KD.CKD.TEMPERATURE"]),
        ("ckd_rcnn_r101_r18.yaml", ["KD.CKD.TEMPERATURE", "warm"], ["KD.CKD.TEMPERATURE", "warm"]),
        ("ckd_rcnn_r101_r18.yaml", ["KD.CKD.TEMPERATURE"], ["pairs"]),
        (
            "ckd_rcnn_r101_r18.yaml",
            ["MODEL.RESNETS.RES2_OUT_CHANNELS", 256],
            ["MODEL.RESNETS.DEPTH is 18", "MODEL.RESNETS.RES2_OUT_CHANNELS 64"],
        ),
        ("ckd_rcnn_r101_r50.yaml", ["MODEL.RESNETS.DEPTH", 20], ["MODEL.RESNETS.DEPTH is 20"]),
    ],
)
def test_mistakes_are_answered_with_the_key_and_the_near_names(name, opts, words):
    with pytest.raises(ConfigError) as error:
        get_config(name, opts)
    for word in words:
        assert word in str(error.value), str(error.value)


@pytest.mark.parametrize("value", [0, "0"])
def test_integer_is_a_float_where_the_option_is_one(tmp_path, value):
    keys = ["KD.HEADKD.WEIGHT", "KD.TEACHER.INHERIT_LR_FACTOR", "SOLVER.BASE_LR"]
    (tmp_path / "base.yaml").write_text(
        f"SOLVER: {{BASE_LR: {value!r}}}\nKD: {{HEADKD: {{WEIGHT: 3}}}}\n"
    )
    (tmp_path / "own.yaml").write_text(
        f"_BASE_: base.yaml\nKD: {{TEACHER: {{INHERIT_LR_FACTOR: {value!r}}}}}\nVERSION: 2\n"
    )
    given = [x for key in keys for x in (key, value)]
    for cfg in (
        get_config("ckd_rcnn_r101_r18.yaml", ["KD.HEADKD.WEIGHT", 0.5, *given]),
        get_config(str(tmp_path / "own.yaml"), ["KD.HEADKD.WEIGHT", value]),
    ):
        values = [flatten(cfg)[key] for key in keys]
        assert values == [0, 0, 0] and all(type(x) is float for x in values)
    assert get_config(str(tmp_path / "own.yaml")).KD.HEADKD.WEIGHT == 3.0
    cfg = get_config("ckd_rcnn_r101_r18.yaml", ["KD.CKD.GROUP_SIZE", 4])
    assert type(cfg.KD.CKD.GROUP_SIZE) is int
    for wrong in (True, "True", [1]):
        with pytest.raises(ConfigError, match="INHERIT_LR_FACTOR"):
            get_config("ckd_rcnn_r101_r18.yaml", ["KD.TEACHER.INHERIT_LR_FACTOR", wrong])


def test_error_with_no_near_name_does_not_list_hundreds():
    few = did_you_mean("zzz", ["b", "a"])
    assert few == "; known: a, b"
    many = did_you_mean("zzz", [f"name {number:03}" for number in range(140)])
    assert many.endswith("name 011, ... (140 in all)") and "name 012" not in many


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('_BASE_: "ckd_rcnn_r101_r18.yaml"', ["_BASE_", "is a path", "write '", "_r101_r18.yaml"]),
        ('_BASE_: "gone.yaml"', ["gone.yaml", "does not exist", "is a path"]),
        ("MODEL: {META: [}", ["own.yaml is not readable YAML (", "line 1", "plain YAML"]),
        ("MODEL: 1\n MASK_ON: True", ["own.yaml is not readable YAML (", "line 2"]),
        ("just text", ["own.yaml", "KEY: VALUE"]),
        ("- MODEL", ["own.yaml", "KEY: VALUE"]),
        ("MODEL: 3", ["own.yaml", "KEY: VALUE"]),
        ("# nothing yet", ["own.yaml", "KEY: VALUE"]),
    ],
)
def test_config_file_that_cannot_be_read_is_answered_in_a_sentence(tmp_path, text, words):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        get_config(str(tmp_path / "own.yaml"))
    for word in words:
        assert word in str(error.value), str(error.value)


class RunsCode:
    """What a malicious file makes, where it is read unsafely."""

    def __init__(self, *args):
        pytest.fail("code of a YAML file ran")


@pytest.mark.parametrize("tag", [f"object/apply:{__name__}.RunsCode", "name:os.system", "tuple"])
def test_yaml_files_run_no_code(tmp_path, tag):
    base, own = tmp_path / "base.yaml", tmp_path / "own.yaml"
    base.write_text(f"MODEL:\n  WEIGHTS: !!python/{tag} ['a']\n")
    own.write_text("_BASE_: base.yaml\n")
    teacher = ["KD.TEACHER.CONFIG_FILE", str(own), "KD.TEACHER.WEIGHTS", "none"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(base.read_text())
    for read in (
        lambda: get_config(str(base)),
        lambda: get_config(str(own)),
        lambda: teacher_config(get_config("ckd_rcnn_r101_r18.yaml", teacher)),
        lambda: load_run_config(tmp_path / "run"),
    ):
        with pytest.raises(ConfigError, match=rf"python/{tag}' in .*line 2, .* can run code"):
            read()


def test_tags_in_files_of_the_model_zoo_are_read(tmp_path):
    zoo = model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    (tmp_path / "own.yaml").write_text(f"_BASE_: {zoo}\nMODEL: {{RETINANET: {{NUM_CLASSES: 3}}}}\n")
    cfg = get_config(str(tmp_path / "own.yaml"))
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES[0][0] == 32 and cfg.MODEL.RETINANET.NUM_CLASSES == 3


def test_teacher_without_distillers_is_said_to_teach_nothing(tmp_path, caplog):
    build_model(distilled_cfg(tmp_path, []))
    assert "KD.DISTILLERS is empty: nothing is distilled" in caplog.text


def test_weights_given_in_code_are_checked():
    distillers = {"CKD": CKD(), "KD": KD()}
    assert check_weights({"CKD": 0.5}, distillers) == {"CKD": 0.5, "KD": 1.0}
    assert check_weights({}, distillers) == {"CKD": CKD.default_weight, "KD": 1.0}
    with pytest.raises(ConfigError, match="distillation_weights names 'ckd', .*did you mean CKD"):
        check_weights({"ckd": 0.1}, distillers)
    for weight in (float("nan"), -1, "1"):
        with pytest.raises(ConfigError, match=r"distillation_weights\['CKD'\] is "):
            check_weights({"CKD": weight}, distillers)
