"""PKD, PCKD, RPNKD, BoxKD, MaskKD and HeadKD: options, and that they compare the right parts."""

import pytest
import torch

from kd_detectron.distillers import ModelSpec, build_distiller
from kd_detectron.errors import ConfigError
from kd_detectron.losses import (
    box_kd_loss,
    head_kd_loss,
    mask_kd_loss,
    pckd_loss,
    pkd_loss,
    rpn_kd_loss,
)

LEVELS = {"p2": 4, "p3": 8, "p6": 64}


def spec(channels=256, box_channels=16):
    return ModelSpec(dict.fromkeys(LEVELS, channels), LEVELS, 3, box_channels)


def only_loss(name, options, context, both=None):
    both = both or ModelSpec()
    distiller = build_distiller(name, options, both, both)
    assert list(distiller.parameters()) == []
    losses = distiller(context)
    assert list(losses) == [f"loss_{name.lower()}"]
    return losses[f"loss_{name.lower()}"]


@pytest.mark.parametrize(("max_stride", "count"), [(4, 1), (8, 2), (32, 3)])
@pytest.mark.parametrize(("name", "loss_of"), [("PKD", pkd_loss), ("PCKD", pckd_loss)])
def test_pkd_and_pckd_sum_the_levels_up_to_their_stride(
    name, loss_of, max_stride, count, make_context
):
    context = make_context()
    levels = list(context.student.features)[:count]
    strides = dict(zip(context.student.features, (4, 8, 16), strict=True))
    same = ModelSpec(dict.fromkeys(strides, 4), strides)
    loss = only_loss(name, {"MAX_STRIDE": max_stride}, context, same)
    maps = [[side.features[x] for x in levels] for side in (context.student, context.teacher)]
    assert torch.equal(loss, loss_of(*maps))


@pytest.mark.parametrize("name", ["PKD", "PCKD"])
def test_pkd_and_pckd_compare_p2_to_p5_by_default_with_pkds_weight(name):
    distiller = build_distiller(name, {}, spec(), spec())
    assert distiller.num_levels == 2 and distiller.default_weight == 6.0


@pytest.mark.parametrize("name", ["PKD", "PCKD"])
def test_pkd_and_pckd_refuse_other_channels_and_strides_that_no_level_has(name):
    with pytest.raises(
        ConfigError, match=rf" {name}.*\[256, 256, 256\].*\[128, 128, 128\].*ReviewKD"
    ):
        build_distiller(name, {}, spec(), spec(128))
    with pytest.raises(ConfigError, match=rf"KD.{name}.MAX_STRIDE is 2.*\[4, 8, 64\]"):
        build_distiller(name, {"MAX_STRIDE": 2}, spec(), spec())


@pytest.mark.parametrize("anchors", ["sampled", "all"])
def test_rpnkd_is_its_loss_over_all_levels(anchors, make_context):
    context = make_context()
    loss = only_loss("RPNKD", {"ANCHORS": anchors, "DELTA_WEIGHT": 0.5}, context)
    labels = torch.cat(list(context.anchor_labels.values()), dim=1)
    expected = rpn_kd_loss(*rpn_outputs(context), labels, anchors=anchors, delta_weight=0.5)
    assert torch.equal(loss, expected)


def rpn_outputs(context):
    return [
        torch.cat(list(getattr(side, part).values()), dim=1)
        for part in ("objectness", "anchor_deltas")
        for side in (context.student, context.teacher)
    ]


@pytest.mark.parametrize("form", ["teacher", "bounded"])
def test_boxkd_is_its_loss(form, make_context):
    context = make_context()
    loss = only_loss("BoxKD", {"FORM": form, "MARGIN": 0.1}, context)
    deltas = context.student.box_deltas, context.teacher.box_deltas
    expected = box_kd_loss(*deltas, context.targets, context.box_targets, 3, form=form, margin=0.1)
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("form", ["cross_entropy", "relative"])
def test_maskkd_is_its_loss(form, make_context):
    context = make_context()
    loss = only_loss("MaskKD", {"FORM": form}, context)
    masks = context.student.mask_logits, context.teacher.mask_logits
    assert torch.equal(loss, mask_kd_loss(*masks, context.mask_classes, form=form))


def test_maskkd_is_a_cross_entropy_by_default(make_context):
    context = make_context()
    expected = only_loss("MaskKD", {"FORM": "cross_entropy"}, context)
    assert torch.equal(only_loss("MaskKD", {}, context), expected)


@pytest.mark.parametrize("name", ["HeadKD"])
def test_headkd_is_its_loss_over_all_levels_with_pckds_weight(name, make_context, make_distiller):
    context, distiller = make_context(), make_distiller(name)
    features = context.student.box_features, context.teacher.box_features
    expected = head_kd_loss(*rpn_outputs(context), *features)
    assert torch.equal(distiller(context)["loss_headkd"], expected)
    assert list(distiller.parameters()) == [] and distiller.default_weight == 6.0


def test_headkd_refuses_box_features_of_another_width():
    with pytest.raises(ConfigError, match=r"HeadKD.*16 ch.*FC_DIM.*'s 32;.*POOLER_RESOLUTION.*DCD"):
        build_distiller("HeadKD", {}, spec(), spec(box_channels=32))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("RPNKD", {"ANCHORS": "some"}, "KD.RPNKD.ANCHORS is 'some'"),
        ("RPNKD", {"DELTA_WEIGHT": -1.0}, "KD.RPNKD.DELTA_WEIGHT is -1.0"),
        ("BoxKD", {"FORM": "free"}, "KD.BOXKD.FORM is 'free'"),
        ("BoxKD", {"MARGIN": float("nan")}, "KD.BOXKD.MARGIN is nan"),
        ("MaskKD", {"FORM": "bce"}, "KD.MASKKD.FORM is 'bce'.*'cross_entropy' or 'relative'"),
        ("PKD", {"MAX_STRIDE": 4.5}, "KD.PKD.MAX_STRIDE is 4.5"),
        ("PCKD", {"FLOOR": 0}, "KD.PCKD.FLOOR is 0"),
        ("PCKD", {"FLOOR": 1e-7}, "KD.PCKD.FLOOR is 1e-07; .* at least 1e-06"),
    ],
)
def test_impossible_options_are_refused_by_their_config_keys(name, options, words):
    with pytest.raises(ConfigError, match=words):
        build_distiller(name, options, spec(), spec())
