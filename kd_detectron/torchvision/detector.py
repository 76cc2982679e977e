"""DistilledDetector: a torchvision detector with a frozen teacher and a list of distillers.

One training step, all of it in :meth:`DistilledDetector.forward`:

1. the student's own forward pass, once, with taps on it;
2. a context of what both models computed, the teacher's part lazily;
3. each distiller's losses, times its weight, merged into torchvision's losses.

In eval mode it is the student. ``student`` is the plain torchvision model to ship: script it,
export it, save it.

Legend: N images, R sampled proposals over the whole batch, K foreground classes.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from kd_detectron.context import DistillationContext, StudentOutputs, TeacherOutputs
from kd_detectron.distillers import (
    Distiller,
    ModelSpec,
    build_distiller,
    check_classes,
    check_weight,
    distillation_losses,
    find_distiller,
)
from kd_detectron.errors import ConfigError

from .anatomy import Anatomy, read_anatomy
from .autocast import boxes_in_float32
from .conventions import (
    background_last,
    background_last_targets,
    rows_of_anchors,
    without_background,
)
from .inherit import inherit_parts
from .taps import StudentTaps
from .teacher import FrozenTeacher, TeacherRun

# What a distiller may require, by the part of a detector that computes it.
_OF_BOXES = frozenset({"logits", "box_features", "box_deltas", "box_targets"})
_OF_RPN = frozenset({"objectness", "anchor_deltas", "anchor_labels"})
_BY_LEVEL = frozenset({"features", "objectness", "anchor_deltas"})


class DistilledDetector(nn.Module):
    """A torchvision detector as a student; trains like one, and in eval mode it is the student.

    Attributes:
        student: the plain torchvision model.
        teacher: the :class:`FrozenTeacher`, or None. A plain object, so never in ``state_dict()``.
        distillers: ``nn.ModuleDict`` by name; what they train is among ``parameters()``.
        distillation_weights: loss weight by distiller name.
        distillation_factor: multiplies all weights, 1 at first, for schedules; at 0 the teacher
            does not run.
        inherited: names of the student's tensors that started from the teacher's.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        distillers: Sequence[str | Distiller] | Mapping[str, float | Mapping] = (),
        *,
        inherit: str | Sequence[str] = (),
        teacher_amp: bool = True,
    ):
        """
        Args:
            student: a torchvision Faster, Mask or Keypoint R-CNN, RetinaNet or FCOS.
            teacher: a trained one; it is frozen in place.
            distillers: registered names or distiller objects, each with its default weight; or
                the weight by name; or a mapping of options by name, "weight" among them.
            inherit: the starts of the names of tensors ("rpn", "roi_heads") that the student
                copies from the teacher before training, or "auto" for all parts that fit
                (``inherit.py``). Works without any distiller.
            teacher_amp: run the teacher in half precision on CUDA.

        Raises:
            ConfigError: student, teacher, a distiller or an inherited part does not fit.
        """
        super().__init__()
        options = _options_by_name(distillers)
        inherit = [inherit] if isinstance(inherit, str) else inherit
        if (options or inherit) and teacher is None:
            raise ConfigError(
                f"distillers {list(options)} and inherit {list(inherit)} are given but no teacher; "
                "give a trained torchvision detector as teacher"
            )
        if teacher is student:
            raise ConfigError("student and teacher are the same object; build the student anew")
        self.student = student
        self._anatomy = read_anatomy(student, "student")
        self.inherited = frozenset(inherit_parts(inherit, student, teacher) if inherit else ())
        self.teacher = FrozenTeacher(teacher, amp=teacher_amp) if options else None
        self._levels = self._shared_levels() if options else []
        # Building layers draws random numbers: the student's training shall not depend on them.
        with torch.random.fork_rng(devices=[]):
            built = {name: self._build(name, entry) for name, entry in options.items()}
        self.distillers = nn.ModuleDict(built).to(next(student.parameters()).device)
        self.distillation_weights = {
            name: _weight(name, entry, built[name]) for name, entry in options.items()
        }
        self.distillation_factor = 1.0
        self._reads_rpn = any(not one.requires or one.requires & _OF_RPN for one in built.values())
        self._register_state_dict_hook(_without_student_prefix)
        self.register_load_state_dict_pre_hook(_with_student_prefix)

    def forward(self, images: list[torch.Tensor], targets: list[dict] | None = None):
        """What torchvision's detectors take and return.

        Args:
            images: N tensors (3, H, W) in [0, 1].
            targets: in training, one dict per image: "boxes" (G, 4), "labels" (G,) from 1, ...

        Returns:
            In training the dict of losses, torchvision's own and those of the distillers, weighted;
            in eval mode the student's detections.
        """
        if not self.training:
            return self.student(images, targets)
        with boxes_in_float32(self.student):
            if not self.distillers:
                return self.student(images, targets)
            with StudentTaps(self.student, self._anatomy) as taps:
                losses = self.student(images, targets)
        weights, factor = self.distillation_weights, self.distillation_factor
        context = self._context(taps)
        return losses | distillation_losses(self.distillers, weights, factor, context, losses)

    def _context(self, taps: StudentTaps) -> DistillationContext:
        anatomy, num_classes = self._anatomy, self._anatomy.spec.num_classes
        maps = dict(zip(anatomy.levels, taps.features.values(), strict=True))
        sizes = {level: tuple(maps[level].shape[-2:]) for level in self._levels}
        counts = [
            one.shape[-2] * one.shape[-1] * anatomy.anchors_per_location[level]
            for level, one in maps.items()
        ]

        def by_level(tensors) -> dict[str, torch.Tensor]:
            named = dict(zip(anatomy.levels, tensors, strict=True))
            return {level: named[level] for level in self._levels}

        student = StudentOutputs(features=by_level(taps.features.values()))
        teacher = TeacherRun(self.teacher, taps, self.student, self._levels, sizes)
        context = DistillationContext(
            student=student,
            teacher=TeacherOutputs(teacher),
            num_classes=num_classes,
            image_sizes=[tuple(size) for size in taps.images.image_sizes],
            gt_boxes=[target["boxes"] for target in taps.targets],
            anchors=by_level(taps.anchors.split(counts)),
        )
        if anatomy.has_boxes and self._reads_rpn:
            student.objectness = by_level(rows_of_anchors(x, 1).flatten(1) for x in taps.objectness)
            student.anchor_deltas = by_level(rows_of_anchors(x, 4) for x in taps.anchor_deltas)
            positive, negative = (torch.stack(masks).bool() for masks in taps.sampled_anchors)
            labels = torch.full_like(positive, -1, dtype=torch.long)
            labels = labels.masked_fill(negative, 0).masked_fill(positive, 1)
            context.anchor_labels = by_level(labels.split(counts, dim=1))
        if anatomy.has_boxes:
            student.box_features = taps.box_features
            student.logits = background_last(taps.logits)
            student.box_deltas = without_background(taps.box_deltas, num_classes)
            labels = torch.cat(taps.labels)
            foreground = labels > 0
            context.proposal_boxes = list(taps.proposal_boxes)
            context.targets = background_last_targets(labels, num_classes)
            # Background rows, in images without objects not even finite, are zeros.
            context.box_targets = torch.cat(taps.box_targets).masked_fill(~foreground[:, None], 0)
            if anatomy.has_masks:
                student.mask_logits = without_background(taps.mask_logits, num_classes)
                context.mask_classes = context.targets[foreground]
        return context

    def _shared_levels(self) -> list[str]:
        teacher = self.teacher.anatomy.levels
        return [level for level in self._anatomy.levels if level in teacher]

    def _build(self, name: str, entry: Distiller | Mapping) -> Distiller:
        with _arguments_for_config_keys(name):
            known = entry if isinstance(entry, Distiller) else find_distiller(name)
            _check_fits(name, known.requires, self._anatomy, self.teacher.anatomy, self._levels)
            if isinstance(entry, Distiller):
                return entry
            options = {key: value for key, value in entry.items() if key.lower() != "weight"}
            anatomies = (self._anatomy, self.teacher.anatomy)
            return build_distiller(
                name, options, *(_of_levels(one.spec, self._levels) for one in anatomies)
            )


@contextlib.contextmanager
def _arguments_for_config_keys(name: str) -> Iterator[None]:
    """Errors of distillers name the config keys of Detectron2's files; here, what stands for them.

    Args:
        name: of the distiller.
    """
    try:
        yield
    except ConfigError as error:
        message, node = str(error), f"KD.{name.upper()}"
        for key, argument in (
            (f"{node}.", f"{name}'s "),
            (node, name),
            ("KD.DISTILLERS names", "distillers names"),
            ("MODEL.FPN.OUT_CHANNELS", "out_channels of the FPN"),
            ("MODEL.ROI_BOX_HEAD.FC_DIM or CONV_DIM", "representation_size of the box head"),
            ("tools/train_net.py --import FILE.py", "--import FILE.py"),
        ):
            message = message.replace(key, argument)
        raise ConfigError(message) from error


def _options_by_name(distillers) -> dict[str, Distiller | Mapping]:
    """Distiller objects and option mappings by name, whatever form they were given in."""
    if isinstance(distillers, str):
        distillers = [distillers]
    if isinstance(distillers, Mapping):
        return {
            name: entry if isinstance(entry, Mapping) else {"weight": entry}
            for name, entry in distillers.items()
        }
    names = [one if isinstance(one, str) else type(one).__name__ for one in distillers]
    if len(set(names)) != len(names):
        raise ConfigError(f"distillers are {names}: name each distiller once")
    return {
        name: {} if isinstance(one, str) else one
        for name, one in zip(names, distillers, strict=True)
    }


def _weight(name: str, entry: Distiller | Mapping, distiller: Distiller) -> float:
    options = {} if isinstance(entry, Distiller) else entry
    given = {key.lower(): value for key, value in options.items()}
    return check_weight(f"the weight of '{name}'", given.get("weight", distiller.default_weight))


def _of_levels(spec: ModelSpec, levels: Sequence[str]) -> ModelSpec:
    """A model's spec, of these levels alone."""
    return replace(
        spec,
        channels={level: spec.channels[level] for level in levels},
        strides={level: spec.strides[level] for level in levels},
    )


def _check_fits(
    name: str, requires: frozenset[str], student: Anatomy, teacher: Anatomy, levels: Sequence[str]
) -> None:
    """Refuses a distiller that reads parts which student or teacher lack or do not share."""
    for who, anatomy in (("student", student), ("teacher", teacher)):
        if requires & (_OF_BOXES | _OF_RPN) and not anatomy.has_boxes:
            raise ConfigError(
                f"'{name}' reads outputs of the RPN or of the box head, which the {who}, a "
                "single-stage detector, does not have; use distillers of features, such as "
                "ReviewKD, or a Faster, Mask or Keypoint R-CNN"
            )
        if "mask_logits" in requires and not anatomy.has_masks:
            raise ConfigError(
                f"'{name}' reads mask logits, but the {who} has no mask head; use a Mask R-CNN for "
                f"both, or leave '{name}' out"
            )
    number = "the number of classes without the background"
    check_classes(name, requires, student.spec, teacher.spec, key=number)
    if requires & _BY_LEVEL and not levels:
        strides = [list(anatomy.spec.strides.values()) for anatomy in (student, teacher)]
        raise ConfigError(
            f"'{name}' compares feature levels of the same stride, but the student's strides are "
            f"{strides[0]} and the teacher's {strides[1]}; choose backbones that share a stride"
        )
    for level in levels if requires & _OF_RPN else ():
        (sizes, ratios), (others, other_ratios) = student.anchors[level], teacher.anchors[level]
        if (sizes, ratios) != (others, other_ratios):
            raise ConfigError(
                f"'{name}' compares anchor by anchor, but those of {level} have sizes {sizes} and "
                f"aspect ratios {ratios} for the student, {others} and {other_ratios} for the "
                "teacher; build both with the same anchor generator"
            )
    if "mask_logits" in requires and student.mask_size != teacher.mask_size:
        raise ConfigError(
            f"'{name}' compares masks pixel by pixel, but they have {student.mask_size} pixels per "
            f"side for the student and {teacher.mask_size} for the teacher; build both with the "
            "same mask head"
        )


def _without_student_prefix(module, state_dict, prefix, local_metadata) -> None:
    for key in [key for key in state_dict if key.startswith(f"{prefix}student.")]:
        state_dict[prefix + key.removeprefix(f"{prefix}student.")] = state_dict.pop(key)


def _with_student_prefix(module, state_dict, prefix, *_) -> None:
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        if not name.startswith("distillers."):
            state_dict[f"{prefix}student.{name}"] = state_dict.pop(key)
