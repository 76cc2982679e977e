"""Gradient norms of each distillation loss, compared with those of the detection losses.

For a few training batches and one state of the weights: the norm of the gradient of each loss, by
part of the student (backbone, FPN, heads), the ratio to that of all detection losses together, and
the cosine between the two. They help to choose a weight (at a ratio near 1 in the backbone, both
have the same influence) and show whether a loss acts against the labels (cosine below 0).

``tools/gradient_norms.py`` prints the table. Nothing is trained or written; BatchNorm runs as in
training.
"""

import argparse
import statistics
from collections.abc import Iterable, Sequence
from itertools import islice

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
        with its weight, and by part of :data:`PARTS` "norm", "ratio" (to the norm of all detection
        losses) and "cosine" (with their gradient); medians over the batches.
    """
    parts = student_parts(model)
    parameters = [parameter for part in parts.values() for parameter in part]
    sizes = [len(part) for part in parts.values()]
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
            flat = [
                torch.cat([g.double().flatten() for g in chunk]) if chunk else torch.zeros(1)
                for chunk in _split(gradients, sizes)
            ]
            reference = reference or flat
            seen.setdefault(name, []).append(
                {"value": loss.item()}
                | {part: _compare(g, r) for part, g, r in zip(PARTS, flat, reference, strict=True)}
            )
    for hook in hooks:
        hook.remove()
    return [{"loss": name, **_medians(records)} for name, records in seen.items()]


def _split(items, sizes):
    start = 0
    for size in sizes:
        yield items[start : start + size]
        start += size


def _compare(gradient: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    norm, other = gradient.norm().item(), reference.norm().item()
    return {
        "norm": norm,
        "ratio": norm / other if other else 0.0,
        "cosine": torch.dot(gradient, reference).item() / (norm * other) if norm * other else 0.0,
    }


def _medians(records: list[dict]) -> dict:
    median = {"value": statistics.median(record["value"] for record in records)}
    for part in PARTS:
        median[part] = {
            key: statistics.median(record[part][key] for record in records)
            for key in ("norm", "ratio", "cosine")
        }
    return median


def format_gradient_norms(rows: list[dict]) -> str:
    """The table as text: ratio and cosine by part."""
    headers = [
        "loss",
        "value",
        *(f"{part}: {what}" for part in PARTS for what in ("norm", "ratio", "cos")),
    ]
    body = [
        [row["loss"], f"{row['value']:.3g}"]
        + [f"{row[part][key]:.2g}" for part in PARTS for key in ("norm", "ratio", "cosine")]
        for row in rows
    ]
    return tabulate(body, headers=headers, tablefmt="github")


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
    return format_gradient_norms(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parse_arguments(build_parser(), arguments)
    return exit_code(lambda: print(measure(args)))
