"""Which distillers a pair of Detectron2 models can be trained with: refused before the first step.

:func:`check_fits` compares, for each output that a distiller requires, what must be the same in
student and teacher for their tensors to be comparable.
"""

import math

from torch import nn

from kd_detectron.distillers import ModelSpec, check_classes
from kd_detectron.errors import ConfigError

from .frozen_teacher import FrozenTeacher
from .taps import anchor_levels_of, mask_head_of, rpn_of


def check_fits(
    name: str,
    requires: frozenset[str],
    student_model,
    student: ModelSpec,
    teacher: FrozenTeacher,
) -> None:
    """Refuses a distiller that reads parts which student or teacher lack or do not share.

    Args:
        name: the distiller.
        requires: the outputs that it reads.
        student_model: the student, or an object with its parts as attributes.
        student: what is known of the student.
        teacher: with all heads that the distiller requires.

    Raises:
        ConfigError: naming the key, both values and the fix.
    """
    models = {"student": student_model, "teacher": teacher.model}
    if requires & {"logits", "box_features", "box_deltas"}:
        _check_box_heads(name, {"student": student, "teacher": teacher.spec})
    check_classes(name, requires, student, teacher.spec, key="MODEL.ROI_HEADS.NUM_CLASSES")
    if "logits" in requires:
        _check_softmax(name, models)
    if "box_deltas" in requires:
        _check_box_coding(name, models)
    if "mask_logits" in requires:
        _check_mask_heads(name, models)
    if "features" in requires:
        _check_levels(name, student, teacher.spec)
    if requires & {"features", "objectness"}:
        paddings = [padding_of(model.backbone) for model in models.values()]
        if paddings[0] != paddings[1]:
            raise ConfigError(
                f"'{name}' compares maps, but images are padded {paddings[0]} for the student "
                f"(MODEL.BACKBONE.NAME) and {paddings[1]} for the teacher "
                "(KD.TEACHER.CONFIG_FILE), so the maps' sizes differ; choose backbones that pad "
                "alike, or distillers of logits or box features alone"
            )
    if "objectness" in requires:
        _check_rpn(name, models)
    if "anchors" in requires:
        _check_anchor_levels(name, requires, student_model, student)


def padding_of(backbone) -> str:
    """How Detectron2 pads images for a backbone, as text: "to multiples of 32" pixels."""
    constraints = backbone.padding_constraints
    multiple = constraints.get("size_divisibility", backbone.size_divisibility)
    if square := constraints.get("square_size", 0):
        side = math.ceil(square / multiple) * multiple if multiple else square
        return f"to squares of {side}"
    return f"to multiples of {multiple}"


def same_anchors(student_model, teacher_model) -> bool:
    """Whether two detectors have the same anchors, coded alike, at the same levels."""
    return _anchors(student_model) == _anchors(teacher_model)


def uses_sigmoid(model) -> bool:
    """``USE_SIGMOID_CE`` of the box head, of its first stage where there are several (Cascade)."""
    predictor = model.roi_heads.box_predictor
    first = predictor[0] if isinstance(predictor, nn.ModuleList) else predictor
    return getattr(first, "use_sigmoid_ce", False)


def box_codings(model) -> list[tuple[float, ...]]:
    """``BBOX_REG_WEIGHTS`` of the box head, of each stage where there are several (Cascade)."""
    predictor = model.roi_heads.box_predictor
    stages = predictor if isinstance(predictor, nn.ModuleList) else [predictor]
    return [tuple(stage.box2box_transform.weights) for stage in stages]


def _anchors(model) -> dict[str, str]:
    """What must agree for two RPNs or dense heads to speak of the same boxes, as text."""
    generator, levels = anchor_levels_of(model)
    coding = (rpn_of(model) or model).box2box_transform.weights
    cells = zip(levels, generator.cell_anchors, generator.strides, strict=True)
    return {
        **{
            f"the set of anchors of {level}": f"{_sizes(x)} (stride {stride})"
            for level, x, stride in cells
        },
        "MODEL.ANCHOR_GENERATOR.OFFSET": str(generator.offset),
        "the coding of boxes (BBOX_REG_WEIGHTS)": str(tuple(coding)),
    }


def _sizes(cells) -> str:
    if cells.is_meta:  # A model without memory, built to look at its shapes.
        return f"{len(cells)} anchors"
    return ", ".join(f"{x1 - x0:.0f}x{y1 - y0:.0f}" for x0, y0, x1, y1 in cells.tolist())


def _check_box_heads(name: str, specs: dict[str, ModelSpec]) -> None:
    for who, spec in specs.items():
        if spec.box_channels is None:
            raise ConfigError(
                f"KD.DISTILLERS has '{name}', which reads box-head outputs, but the {who} has "
                "not exactly one box head (RetinaNet, Cascade and C4 models); use feature "
                "distillers such as ReviewKD, or a Faster or Mask R-CNN with FPN"
            )


def _check_softmax(name: str, models: dict) -> None:
    for who, model in models.items():
        if uses_sigmoid(model):
            raise ConfigError(
                f"MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE is True for the {who}, so its background logit "
                f"is never trained, but '{name}' compares class probabilities with background; "
                "set it to False and train again, or use distillers of other outputs"
            )


def _check_box_coding(name: str, models: dict) -> None:
    codings = [box_codings(model)[0] for model in models.values()]
    if codings[0] != codings[1] or len(codings[0]) != 4:
        raise ConfigError(
            f"MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS is {codings[0]} for the student and "
            f"{codings[1]} for the teacher, but '{name}' compares box deltas; give both the same "
            "four weights"
        )


def _check_mask_heads(name: str, models: dict) -> None:
    for who, model in models.items():
        if mask_head_of(model) is None:
            raise ConfigError(
                f"KD.DISTILLERS has '{name}', which reads mask logits, but the {who} has no mask "
                "head whose last layer gives them; set MODEL.MASK_ON to True with the "
                f"MaskRCNNConvUpsampleHead in both models, or remove '{name}'"
            )
    sizes = [model.roi_heads.mask_pooler.output_size for model in models.values()]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION is {sizes[0]} for the student and {sizes[1]} "
            f"for the teacher, but '{name}' compares masks pixel by pixel; give both the same"
        )


def _check_levels(name: str, student: ModelSpec, teacher: ModelSpec) -> None:
    if list(student.strides.items()) != list(teacher.strides.items()):
        raise ConfigError(
            f"'{name}' compares feature levels, but the student's (MODEL.FPN) are "
            f"{_levels(student)} and the teacher's (KD.TEACHER.CONFIG_FILE) are "
            f"{_levels(teacher)}; choose a teacher with the same levels and strides"
        )


def _levels(spec: ModelSpec) -> str:
    return ", ".join(f"{level} (stride {stride})" for level, stride in spec.strides.items())


def _check_rpn(name: str, models: dict) -> None:
    for who, model in models.items():
        rpn = rpn_of(model)
        if rpn is None or not hasattr(rpn.anchor_generator, "cell_anchors"):
            raise ConfigError(
                f"KD.DISTILLERS has '{name}', which reads the RPN's outputs, but the {who} has no "
                "RPN with anchors (MODEL.PROPOSAL_GENERATOR.NAME); use Faster or Mask R-CNN for "
                f"both, or remove '{name}'"
            )
    own, others = (_anchors(model) for model in models.values())
    for what in [*own, *others]:
        if own.get(what) != others.get(what):
            raise ConfigError(
                f"'{name}' compares the RPNs anchor by anchor, but {what} is "
                f"{own.get(what, 'not there')} for the student and "
                f"{others.get(what, 'not there')} for the teacher; give both the same "
                "MODEL.ANCHOR_GENERATOR, MODEL.RPN.IN_FEATURES and MODEL.RPN.BBOX_REG_WEIGHTS"
            )


def _check_anchor_levels(name: str, requires, student_model, student: ModelSpec) -> None:
    anchors = anchor_levels_of(student_model)
    if anchors is None:
        raise ConfigError(
            f"KD.DISTILLERS has '{name}', which reads anchors, but the student has no anchor "
            "generator; remove it or use an RPN (MODEL.PROPOSAL_GENERATOR.NAME)"
        )
    without = [level for level in student.channels if level not in anchors[1]]
    if "features" in requires and without:
        raise ConfigError(
            f"MODEL.RPN.IN_FEATURES is {anchors[1]}, so the feature levels {without} have no "
            f"anchors, but '{name}' reads the anchors of every level; name all levels there, or "
            f"remove '{name}'"
        )
