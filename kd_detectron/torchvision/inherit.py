"""Parts of a torchvision student that start from the teacher's weights."""

from collections.abc import Sequence

from torch import nn

from kd_detectron.inherit import inherit

from .anatomy import read_anatomy

# With "auto", each of these is inherited as a whole where it fits, and each child of the ROI heads.
_PARTS = ("backbone.fpn", "rpn.head", "head")


def inherit_parts(parts: Sequence[str], student: nn.Module, teacher: nn.Module) -> list[str]:
    """Copies parts of the teacher into the student; see :func:`kd_detectron.inherit.inherit`.

    Args:
        parts: the starts of the names of tensors, such as "rpn" and "roi_heads"; "auto" is the FPN,
            the RPN's or the dense head, and each part of the ROI heads, where they fit in whole.
        student: the detector that they are copied into.
        teacher: the detector that they are copied from.
    """
    tensors = student.state_dict()
    heads = getattr(student, "roi_heads", nn.Module())
    names = [*_PARTS, *(f"roi_heads.{name}" for name, _ in heads.named_children())]

    def why_not(module: str, fitting: Sequence[str]) -> str:
        own, others = (read_anatomy(model, "detector") for model in (student, teacher))
        if module in _PARTS and own.levels != others.levels:
            return "its levels are others"
        if module in ("rpn.head", "head") and own.anchors != others.anchors:
            return "its anchors are others"
        if module.endswith("_predictor"):
            if module.replace("_predictor", "_head") not in fitting:
                return "it reads a head that is not inherited"
            codings = [tuple(m.roi_heads.box_coder.weights) for m in (student, teacher)]
            if codings[0] != codings[1]:
                return "its coding of boxes is another"
        return ""

    return inherit(
        parts,
        tensors,
        teacher.state_dict(),
        modules=[x for x in names if any(key.startswith(f"{x}.") for key in tensors)],
        why_not=why_not,
        key="inherit",
    )
