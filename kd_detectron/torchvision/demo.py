"""The demo on torchvision's detectors: the runs of ``demo.yaml``, one table and pictures of them.

Called by ``kd_detectron.studies.demo``, which makes the data; works where Detectron2 is not
installed. Finished runs are skipped and interrupted ones resumed.
"""

from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import yaml

from kd_detectron.runs.run import load_run
from kd_detectron.visualize.report import write_table_and_curves

from .data import DetectionData
from .models import build_detector
from .options import FINAL_WEIGHTS, TrainingOptions
from .pictures import draw_detections
from .training import detector_of_run, train

TEACHER = "teacher"


def demo_runs(output: Path, data: Path) -> dict[str, TrainingOptions]:
    """The demo's runs by name, in the order in which they are trained.

    Args:
        output: the demo's folder; each run has one in it.
        data: the folder of ``train.json``, ``train``, ``val.json`` and ``val``.
    """
    text = files("kd_detectron.torchvision").joinpath("demo.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text.replace("{output}", str(output)))
    paths = {split: (str(data / f"{split}.json"), str(data / split)) for split in ("train", "val")}
    runs = {}
    for entry in content["runs"]:
        name = entry.pop("name")
        own = {"output": str(output / name), "devices": "1"}
        values = _merged(content["common"], entry) | paths | own
        runs[name] = TrainingOptions.from_mapping(values)
    return runs


def run_demo(output: str | Path, data: str | Path, *, iterations: int | None = None) -> None:
    """Trains what is not finished, prints the table, writes table and pictures into ``output``.

    Args:
        output: the demo's folder.
        data: the synthetic data.
        iterations: of every run, in place of those of ``demo.yaml``.
    """
    output = Path(output)
    runs = demo_runs(output, Path(data))
    for number, (name, options) in enumerate(runs.items(), start=1):
        if iterations is not None:
            options = replace(options, iterations=iterations, steps=())
        print(
            f"[{number}/{len(runs)}] {options.output}, {options.iterations} iterations", flush=True
        )
        scores = train(options, resume=True)
        print(f"done: {name}, AP {scores['bbox']['AP']:.1f}", flush=True)
    print("\n" + write_report(output, runs))
    print(f"\ntable and pictures: {output}")


def write_report(output: Path, runs: Mapping[str, TrainingOptions]) -> str:
    """Writes results.md, results.csv, ap.png, curves.png, predictions.png; returns the table."""
    students = {name: [load_run(runs[name].output)] for name in runs if name != TEACHER}
    text = write_table_and_curves(output, students, teacher=Path(runs[TEACHER].output))
    models = {}
    for name, options in runs.items():
        detector, own, num_classes = detector_of_run(options.output)
        weights = str(Path(options.output) / FINAL_WEIGHTS)
        model = build_detector(detector, num_classes, weights=weights, options=own)
        models[name] = model.eval()
    val = DetectionData(*next(iter(runs.values())).val, training=False)
    draw_detections(models, val, output / "predictions.png")
    return text


def _merged(common: Mapping, own: Mapping) -> dict:
    """The options of one run: its own, and the common ones; mappings are merged one level deep."""
    merged = dict(common)
    for key, value in own.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = {**merged[key], **value} if both else value
    return merged
