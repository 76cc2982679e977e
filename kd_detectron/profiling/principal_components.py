"""What the principal components of the teacher's feature maps carry, and a student's error in each.

The channels of an FPN map are correlated: a few directions hold most of its variance. This says how
much of the variance the first k components have, the AP of the teacher when its heads see only
these, and how far a trained student is from the teacher within each group of components. Where a
few components have nearly all the variance but not the AP, losses that compare channels (PKD,
FitNet) leave the others unlearnt; ``PCKD`` compares component with component.

``tools/principal_components.py`` prints the table. Nothing is trained or written.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import nn

from kd_detectron.checkpoint import DistillationCheckpointer
from kd_detectron.commands import exit_code, parse_arguments
from kd_detectron.config import get_config
from kd_detectron.errors import ConfigError
from kd_detectron.modeling.teacher_loading import load_teacher
from kd_detectron.preflight.data import check_data

Maps = Mapping[str, torch.Tensor]
_TASKS = {"bbox": "box AP", "segm": "mask AP"}


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
        """The maps (N, C, H, W) without all but the first ``count`` components."""
        kept = self.directions[:, :count]
        projection = kept @ kept.T
        centred = features.float() - self.mean[:, None, None]
        restricted = torch.einsum("dc,nchw->ndhw", projection, centred)
        return (restricted + self.mean[:, None, None]).to(features.dtype)


@torch.no_grad()
def principal_components(batches: Iterable[Maps]) -> dict[str, Components]:
    """Principal components of each level over all images and locations.

    Args:
        batches: level name -> (N, C, H, W), several times.
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


def kept_components(backbone: nn.Module, components: Mapping[str, Components], count: int):
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
        pairs: maps of student and teacher on the same images, several times.
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
        "variance, the teacher's AP on the first ones alone and, with MODEL.WEIGHTS, the error of "
        "the student in them. On the test data of a distilled config, whose student needs the "
        "teacher's FPN width."
    )
    parser.add_argument("--config-file", required=True, metavar="NAME")
    parser.add_argument(
        "--keep",
        type=int,
        nargs="+",
        default=[2, 4, 8, 16, 32],
        metavar="K",
        help="how many components the teacher keeps, one row each (%(default)s and all)",
    )
    parser.add_argument(
        "--images", type=int, default=64, help="test images (%(default)s) for the components"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides")
    return parser


def measure(args: argparse.Namespace) -> str:
    """Measures the config that the arguments name and returns the table as text.

    Raises:
        ConfigError: the config is not distilled or has no test data, or ``--keep`` is not rising.
    """
    device = [] if torch.cuda.is_available() else ["MODEL.DEVICE", "cpu"]
    cfg = get_config(args.config_file, [*device, *args.opts])
    if not cfg.KD.TEACHER.CONFIG_FILE or not cfg.DATASETS.TEST:
        raise ConfigError(
            f"KD.TEACHER.CONFIG_FILE is '{cfg.KD.TEACHER.CONFIG_FILE}' and DATASETS.TEST is "
            f"{list(cfg.DATASETS.TEST)}; name a config with a teacher and test data"
        )
    check_data(cfg, train=False)
    teacher, input_format = load_teacher(cfg)
    loaders = {"teacher": _loader(cfg, input_format), "student": _loader(cfg, cfg.INPUT.FORMAT)}

    def maps(model: nn.Module, name: str) -> Iterable[Maps]:
        for batch in islice(loaders[name], args.images):
            with torch.no_grad():
                yield model.backbone(model.preprocess_image(batch).tensor)

    components = principal_components(maps(teacher.eval(), "teacher"))
    width = min(len(found.mean) for found in components.values())
    counts = [*(count for count in args.keep if count < width), width]
    if counts[0] < 1 or any(a >= b for a, b in pairwise(counts)):
        raise ConfigError(f"--keep is {args.keep}; give rising numbers from 1 to {width - 1}")
    errors = {}
    if cfg.MODEL.WEIGHTS:
        student = _load_student(cfg)
        pairs = zip(maps(student, "student"), maps(teacher, "teacher"), strict=True)
        errors = component_errors(pairs, components)
    rows = []
    for before, count in pairwise([0, *counts]):
        shares = [f.variances[:count].sum() / f.variances.sum() for f in components.values()]
        variance = torch.stack(shares).mean().item()
        row = {"components": f"1 to {count}", "variance": f"{100 * variance:.1f} %"}
        handle = kept_components(teacher.backbone, components, count)
        row |= _average_precision(cfg, teacher, loaders["teacher"])
        handle.remove()
        if errors:
            added = torch.stack([error[before:count].mean() for error in errors.values()])
            row["student's error in the added ones"] = f"{added.mean().item():.2f}"
        rows.append(row)
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def _loader(cfg: CfgNode, input_format: str):
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.FORMAT = input_format
    return build_detection_test_loader(cfg, cfg.DATASETS.TEST[0])


def _load_student(cfg: CfgNode) -> nn.Module:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.KD.ENABLED = False
    student = build_model(cfg).eval()
    DistillationCheckpointer(student).load(cfg.MODEL.WEIGHTS)
    return student


def _average_precision(cfg: CfgNode, model: nn.Module, loader) -> dict[str, str]:
    evaluator = COCOEvaluator(cfg.DATASETS.TEST[0], output_dir=None)
    results = inference_on_dataset(model, loader, evaluator)
    return {name: f"{results[task]['AP']:.1f}" for task, name in _TASKS.items() if task in results}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parse_arguments(build_parser(), arguments)
    return exit_code(lambda: print(measure(args)))
