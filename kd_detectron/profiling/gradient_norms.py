"""Gradient norms of each distillation loss, compared with those of the detection losses.

For a few training batches and one state of the weights: the norm of the gradient of each loss, by
part of the student (backbone, FPN, heads), the ratio to that of all detection losses together, and
the cosine between the two. They help to choose a weight (at a ratio near 1 in the backbone, both
have the same influence) and show whether a loss acts against the labels (cosine below 0).

``tools/gradient_norms.py`` prints the table. Nothing is trained or written; BatchNorm runs as in
training.
"""

import argparse
from collections.abc import Iterable, Sequence
from itertools import islice
from statistics import median

import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn

from kd_detectron.checkpoint import DistillationCheckpointer
from kd_detectron.commands import (
    add_import_option,
    exit_code,
    import_user_code,
    parse_arguments,
)
from kd_detectron.config import get_config
from kd_detectron.data.loader import build_train_loader
from kd_detectron.preflight.config import check_meta_architecture
from kd_detectron.preflight.data import check_data

DETECTION = "all detection losses"
PARTS = ("backbone", "FPN", "heads")


def student_parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The student's trained parameters by part; those of the distillers are in none."""
    parts: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        if name.startswith("distillers.") or not parameter.requires_grad:
            continue
        if name.startswith("backbone.bottom_up."):
            parts["backbone"].append(parameter)
        else:
            parts["FPN" if name.startswith("backbone.") else "heads"].append(parameter)
    return parts


def gradient_norms(model: nn.Module, batches: Iterable[list[dict]]) -> list[dict]:
    """Measures the losses of each batch and their gradients.

    Args:
        model: a distilled detector in training mode; call inside an ``EventStorage``.
        batches: Detectron2's inputs, one list per batch.

    Returns:
        For "all detection losses" and then each distillation loss a dict: "loss" its name, "value"
        with its weight, and for each part of :data:`PARTS` "PART: norm", "PART: ratio" (to the norm
        of all detection losses) and "PART: cosine" (with their gradient); medians over the batches.
    """
    parts = student_parts(model)
    parameters = [parameter for part in parts.values() for parameter in part]
    owners = [name for name, part in parts.items() for _ in part]
    distilled: list[str] = []
    hooks = [
        distiller.register_forward_hook(lambda module, args, losses: distilled.extend(losses))
        for distiller in getattr(model, "distillers", {}).values()
    ]
    seen: dict[str, list[dict]] = {}
    for batch in batches:
        distilled.clear()
        losses = model(batch)
        detection = sum(value for name, value in losses.items() if name not in distilled)
        reference = None
        for name, loss in [(DETECTION, detection), *((n, losses[n]) for n in distilled)]:
            gradients = torch.autograd.grad(
                loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            record = {"value": loss.item()}
            # A part that is frozen as a whole has the gradient 0.
            flat = {part: [loss.new_zeros(1).double()] for part in PARTS}
            for owner, gradient in zip(owners, gradients, strict=True):
                flat[owner].append(gradient.double().flatten())
            flat = {part: torch.cat(chunks) for part, chunks in flat.items()}
            reference = reference or flat
            for part, gradient in flat.items():
                norm, other = gradient.norm().item(), reference[part].norm().item()
                record[f"{part}: norm"] = norm
                record[f"{part}: ratio"] = norm / other if other else 0.0
                cosine = torch.cosine_similarity(gradient, reference[part], dim=0)
                record[f"{part}: cosine"] = cosine.item()
            seen.setdefault(name, []).append(record)
    for hook in hooks:
        hook.remove()
    return [
        {"loss": name} | {key: median(record[key] for record in records) for key in records[0]}
        for name, records in seen.items()
    ]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Gradient of each distillation loss, compared with that of all detection "
        "losses: norm by part of the student, ratio and cosine; at the start of training, or with "
        "MODEL.WEIGHTS at a trained state."
    )
    parser.add_argument("--config-file", required=True, metavar="NAME")
    parser.add_argument("--batches", type=int, default=8, help="training batches (%(default)s)")
    add_import_option(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides")
    return parser


def measure(args: argparse.Namespace) -> str:
    """Measures the config that the arguments name and returns the table as text."""
    for name in args.imports:
        import_user_code(name)
    device = [] if torch.cuda.is_available() else ["MODEL.DEVICE", "cpu"]
    cfg = get_config(args.config_file, [*device, *args.opts])
    check_meta_architecture(cfg)
    check_data(cfg)
    seed = max(cfg.SEED, 0)
    torch.manual_seed(seed)
    model = build_model(cfg)
    DistillationCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    loader = build_train_loader(cfg)
    loader.seek(seed, 0)
    with EventStorage():
        rows = gradient_norms(model.train(), islice(loader, args.batches))
    return tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2g")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parse_arguments(build_parser(), arguments)
    return exit_code(lambda: print(measure(args)))
