"""What the principal components of the teacher's feature maps carry, and a student's error in each.

The channels of an FPN map are correlated: a few directions hold most of its variance. This says how
much of the variance the first k components have, the AP of the teacher when its heads see only
these, and how far a trained student is from the teacher within each group of components. Losses
that compare channels (PKD, FitNet) weight a component by its variance, ``PCKD`` all alike.

``tools/principal_components.py`` prints the table. Nothing is trained or written.
"""

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from tabulate import tabulate
from torch import nn
from torch.utils.hooks import RemovableHandle

from kd_detectron.checkpoint import load_plain_student
from kd_detectron.commands import (
    add_import_option,
    exit_code,
    import_user_code,
    parse_arguments,
)
from kd_detectron.config import get_config
from kd_detectron.errors import ConfigError
from kd_detectron.modeling.teacher_loading import load_teacher
from kd_detectron.preflight.classes import check_teacher_to_evaluate
from kd_detectron.preflight.config import check_meta_architecture
from kd_detectron.preflight.data import check_data
from kd_detectron.preflight.evaluation import evaluator_type

Maps = Mapping[str, torch.Tensor]
_TASKS = {"bbox": "box AP", "segm": "mask AP", "keypoints": "keypoint AP"}


@dataclass(frozen=True)
class Components:
    """Principal components of one level's C channels, the largest first.

    Attributes:
        mean: (C,) of the channels.
        directions: (C, C), one component per column.
        variances: (C,) of the components.
    """

    mean: torch.Tensor
    directions: torch.Tensor
    variances: torch.Tensor

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (C, N * H * W), the components' values."""
        flat = features.float().transpose(0, 1).flatten(1)
        return self.directions.T @ (flat - self.mean[:, None])

    def keep(self, features: torch.Tensor, count: int) -> torch.Tensor:
        """The maps (N, C, H, W) with only the first ``count`` components; the others are 0."""
        kept = self.directions[:, :count]
        projection = kept @ kept.T
        centred = features.float() - self.mean[:, None, None]
        restricted = torch.einsum("dc,nchw->ndhw", projection, centred)
        return (restricted + self.mean[:, None, None]).to(features.dtype)


@torch.no_grad()
def principal_components(batches: Iterable[Maps]) -> dict[str, Components]:
    """Principal components of each level over all images and locations.

    Args:
        batches: one mapping per batch, level name -> (N, C, H, W).
    """
    sums: dict[str, list[torch.Tensor]] = {}
    for maps in batches:
        for level, features in maps.items():
            flat = features.double().transpose(0, 1).flatten(1)
            ones = flat.new_full((), flat.shape[1])
            new = [ones, flat.sum(dim=1), flat @ flat.T]
            old = sums.get(level)
            sums[level] = [a + b for a, b in zip(old, new, strict=True)] if old else new
    found = {}
    for level, (count, total, products) in sums.items():
        mean = total / count
        variances, directions = torch.linalg.eigh(products / count - mean[:, None] * mean)
        found[level] = Components(
            mean.float(), directions.flip(1).float(), variances.flip(0).clamp(min=0).float()
        )
    return found


def kept_components(
    backbone: nn.Module, components: Mapping[str, Components], count: int
) -> RemovableHandle:
    """Restricts what a backbone returns to its first components; returns the hook's handle."""
    return backbone.register_forward_hook(
        lambda module, args, maps: {k: components[k].keep(v, count) for k, v in maps.items()}
    )


@torch.no_grad()
def component_errors(
    pairs: Iterable[tuple[Maps, Maps]], components: Mapping[str, Components]
) -> dict[str, torch.Tensor]:
    """The student's error in each component: E(s - t)^2 / (E s^2 + E t^2), by level, (C,).

    0: as the teacher; 1: unrelated.

    Args:
        pairs: the maps of student and teacher on the same images, one pair per batch.
    """
    sums: dict[str, torch.Tensor] = {}
    for student, teacher in pairs:
        for level, found in components.items():
            own, other = found.project(student[level]), found.project(teacher[level])
            error, power = (own - other).square(), own.square() + other.square()
            new = torch.stack([error.sum(dim=1), power.sum(dim=1)]).double()
            sums[level] = sums[level] + new if level in sums else new
    return {k: error / power.clamp(min=1e-12) for k, (error, power) in sums.items()}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Principal components of the teacher's feature maps: their share of the "
        "variance (mean of the levels), the teacher's AP on the first ones alone, and with "
        "--student the student's error in the components that each row adds, level by level. The "
        "AP is that of the whole first test dataset, evaluated once per row."
    )
    parser.add_argument("--config-file", required=True, metavar="NAME")
    parser.add_argument(
        "--keep",
        type=int,
        nargs="+",
        default=[2, 4, 8, 16, 32],
        metavar="K",
        help="how many components the teacher keeps, one row each and one for all (%(default)s); "
        "another option must follow",
    )
    parser.add_argument(
        "--student", default="", metavar="FILE", help="checkpoint of a student of this config"
    )
    parser.add_argument(
        "--images", type=int, default=64, help="test images for components, errors (%(default)s)"
    )
    add_import_option(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides")
    return parser


def measure(args: argparse.Namespace) -> str:
    """Measures the config that the arguments name and returns the table as text.

    Raises:
        ConfigError: the config has no teacher or COCO-format test data, the student's maps are of
            other sizes than the teacher's, or an argument is wrong.
    """
    for name in args.imports:
        import_user_code(name)
    if args.keep[0] < 1 or any(a >= b for a, b in pairwise(args.keep)):
        raise ConfigError(f"--keep is {args.keep}; give rising numbers of at least 1")
    if args.images < 1:
        raise ConfigError(f"--images is {args.images}; give a number of at least 1")
    device = [] if torch.cuda.is_available() else ["MODEL.DEVICE", "cpu"]
    cfg = get_config(args.config_file, [*device, *args.opts])
    check_meta_architecture(cfg)
    summaries = _check_needs(cfg)
    teacher, input_format = load_teacher(cfg)
    check_teacher_to_evaluate(cfg, summaries, teacher)
    teacher.eval()
    student = None
    if args.student:
        _, student = load_plain_student(args.student, cfg)
        _check_same_maps(student.to(cfg.MODEL.DEVICE).backbone, teacher.backbone)

    def maps(model: nn.Module, input_format: str) -> Iterable[Maps]:
        for batch in islice(_loader(cfg, input_format), args.images):
            with torch.no_grad():
                yield model.backbone(model.preprocess_image(batch).tensor)

    components = principal_components(maps(teacher, input_format))
    errors = {}
    if student:
        own, others = maps(student, cfg.INPUT.FORMAT), maps(teacher, input_format)
        errors = component_errors(zip(own, others, strict=True), components)
    width = max(len(found.mean) for found in components.values())
    counts = [*(count for count in args.keep if count < width), width]
    rows = []
    for before, count in pairwise([0, *counts]):
        shares = [f.variances[:count].sum() / f.variances.sum() for f in components.values()]
        variance = torch.stack(shares).mean().item()
        name = "all" if count == width else f"1 to {count}" if count > 1 else "1"
        row = {"components": name, "variance": f"{100 * variance:.1f} %"}
        handle = kept_components(teacher.backbone, components, count)
        row |= _average_precision(cfg, teacher, _loader(cfg, input_format))
        handle.remove()
        for level, error in errors.items():
            row[f"error, {level}"] = f"{error[before:count].mean().item():.2f}"
        rows.append(row)
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def _check_needs(cfg: CfgNode) -> dict:
    """Refuses a config without teacher or COCO-format test data; summaries of its datasets."""
    if not cfg.KD.TEACHER.CONFIG_FILE or not cfg.DATASETS.TEST:
        raise ConfigError(
            f"KD.TEACHER.CONFIG_FILE is '{cfg.KD.TEACHER.CONFIG_FILE}' and DATASETS.TEST is "
            f"{list(cfg.DATASETS.TEST)}; name a config with a teacher and test data"
        )
    summaries = check_data(cfg, train=False)
    kind = evaluator_type(cfg.DATASETS.TEST[0])
    if kind != "coco":
        raise ConfigError(
            f"DATASETS.TEST names '{cfg.DATASETS.TEST[0]}' of evaluator type '{kind}', but this "
            "needs COCO AP; put a dataset in COCO format first"
        )
    return summaries


def _check_same_maps(student: nn.Module, teacher: nn.Module) -> None:
    own, others = (
        {level: shape.channels for level, shape in backbone.output_shape().items()}
        for backbone in (student, teacher)
    )
    if own != others:
        raise ConfigError(
            f"--student has the levels (channels) {own} and the teacher {others}, but errors are "
            "those of equal ones: give both one MODEL.FPN.OUT_CHANNELS, or leave --student out"
        )


def _loader(cfg: CfgNode, input_format: str) -> Iterable[list[dict]]:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.FORMAT = input_format
    return build_detection_test_loader(cfg, cfg.DATASETS.TEST[0])


def _average_precision(cfg: CfgNode, model: nn.Module, loader) -> dict[str, str]:
    """AP by name of the task; 0 where nothing is detected at all."""
    evaluator = COCOEvaluator(cfg.DATASETS.TEST[0], tasks=_tasks(model), output_dir=None)
    results = inference_on_dataset(model, loader, evaluator)
    found = {_TASKS[task]: results.get(task, {}).get("AP", math.nan) for task in _tasks(model)}
    return {name: f"{0.0 if math.isnan(ap) else ap:.1f}" for name, ap in found.items()}


def _tasks(model: nn.Module) -> tuple[str, ...]:
    heads = getattr(model, "roi_heads", None)
    has = {"segm": "mask_head", "keypoints": "keypoint_head"}
    more = (task for task, head in has.items() if getattr(heads, head, None) is not None)
    return ("bbox", *more)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parse_arguments(build_parser(), arguments)
    return exit_code(lambda: print(measure(args)))
