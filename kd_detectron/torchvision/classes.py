"""Whether teacher and student have the same classes in the same order, where it matters.

Some outputs are compared class by class, and some layers have weights of each class: with as many
classes in another order training runs without an error, but the student learns the wrong classes.
The names are those of the annotation files; a training writes them into its ``config.yaml``.
"""

from collections.abc import Sequence
from pathlib import Path

from kd_detectron.distillers import CLASS_OUTPUTS
from kd_detectron.errors import ConfigError
from kd_detectron.runs import files

from .detector import DistilledDetector

# In config.yaml, under DATASETS: the names of the classes, in the order of their labels.
TRAIN_CLASSES = "TRAIN_CLASSES"
# The layers that have weights of each class.
_CLASS_LAYERS = (
    "roi_heads.box_predictor.",
    "roi_heads.mask_predictor.mask_fcn_logits.",
    "head.classification_head.cls_logits.",
)


def check_class_order(
    model: DistilledDetector, class_names: Sequence[str], teacher_run: str
) -> None:
    """Refuses a teacher of other class names where distillers or ``inherit`` go class by class.

    Where their numbers differ, :class:`DistilledDetector` refuses it itself. Names are compared
    without case; those of a run that did not write them are not known.

    Args:
        model: the student, with what it has of its teacher.
        class_names: of the student's data, in the order of the labels.
        teacher_run: the folder of the teacher's training.
    """
    comparing = [name for name, one in model.distillers.items() if one.requires & CLASS_OUTPUTS]
    inherited = sorted(name for name in model.inherited if name.startswith(_CLASS_LAYERS))
    if comparing:
        reason = f"distillers {comparing} compare their outputs class by class"
        other_way = "feature distillers alone"
    elif inherited:
        reason = f"inherit copies layers of each class, such as {inherited[0]}"
        other_way = "inherit other parts, such as rpn and roi_heads.box_head"
    else:
        return
    known = (files.read_config(teacher_run).get("DATASETS") or {}).get(TRAIN_CLASSES, ())
    for label, (own, other) in enumerate(zip(class_names, known, strict=False), start=1):
        if str(own).strip().lower() != str(other).strip().lower():
            raise ConfigError(
                f"class {label} is '{own}' in train and '{other}' in teacher_run '{teacher_run}', "
                f"but {reason}; use a teacher of the same classes in the same order, or "
                f"{other_way}. If only the names differ, change DATASETS.{TRAIN_CLASSES} in "
                f"{Path(teacher_run) / files.CONFIG}"
            )
