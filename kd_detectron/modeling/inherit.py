"""``KD.TEACHER.INHERIT``: parts of a Detectron2 student that start from the teacher's weights."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

from torch import nn

from kd_detectron.inherit import inherit

from .compatibility import box_codings, same_anchors, uses_sigmoid


def inherit_parts(parts: Sequence[str], student: Mapping, teacher: nn.Module) -> list[str]:
    """Copies parts of the teacher into the student; see :func:`kd_detectron.inherit.inherit`.

    Args:
        parts: ``KD.TEACHER.INHERIT``; "auto" is every module behind the backbone's bottom-up
            network (FPN convolutions, RPN, heads) that fits in whole.
        student: the student's parts by constructor name.
        teacher: the whole detector, as ``load_teacher`` returns it.
    """
    modules = {name: part for name, part in student.items() if isinstance(part, nn.Module)}
    own = {
        f"{name}.{key}": tensor
        for name, part in modules.items()
        for key, tensor in part.state_dict().items()
    }
    student_model = SimpleNamespace(**student)

    def why_not(module: str, fitting: Sequence[str]) -> str:
        if module in ("proposal_generator", "head") and not same_anchors(student_model, teacher):
            return "its anchors are others"
        if module == "roi_heads.box_predictor":
            head = getattr(student_model.roi_heads, "box_head", None)
            if head is not None and "roi_heads.box_head" not in fitting:
                return "it reads a box head that is not inherited"
            if box_codings(student_model) != box_codings(teacher):
                return "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS are others"
            if uses_sigmoid(student_model) != uses_sigmoid(teacher):
                return "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE is another"
        if module.startswith("roi_heads.") and module.endswith("_head"):
            name = module.removeprefix("roi_heads.").replace("_head", "_pooler")
            poolers = [getattr(model.roi_heads, name, None) for model in (student_model, teacher)]
            if len({getattr(pooler, "output_size", None) for pooler in poolers}) > 1:
                return "its POOLER_RESOLUTION is another"
        return ""

    return inherit(
        parts,
        own,
        teacher.state_dict(),
        modules=_behind_the_network(modules),
        why_not=why_not,
        key="KD.TEACHER.INHERIT",
    )


def _behind_the_network(parts: Mapping[str, nn.Module]) -> list[str]:
    """Names of the modules with weights behind the bottom-up network, in the order of the data."""
    names = []
    for owner, part in sorted(parts.items(), key=lambda item: item[0] != "backbone"):
        if owner == "backbone" and not hasattr(part, "bottom_up"):
            continue
        # A dense head is one module: RetinaNet's, or the semantic one.
        children = part.named_children() if owner in ("backbone", "roi_heads") else [("", part)]
        for child, module in children:
            if child != "bottom_up" and module.state_dict():
                names.append(f"{owner}.{child}".rstrip("."))
    return names
