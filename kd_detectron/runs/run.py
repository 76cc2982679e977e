"""Reads a run folder: which method on which pair, its metrics over time and its final AP.

A run folder is Detectron2's ``OUTPUT_DIR``: ``config.yaml`` (the full config), ``metrics.json``
(JSON lines, written during training) and ``result.json`` (written by ``DistillationTrainer`` at the
end). Without ``result.json`` the last evaluation in ``metrics.json`` is taken and the run counts as
unfinished. AP is in points, 0 to 100, as Detectron2 reports it; Detectron2's NaN ("no object of
this size in the data") and a metric that is absent are both missing here, never 0.

Runs are named from what the config says, not from the folder: distillers in alphabetical order
joined by "+" (the order in which the papers name their combinations), "baseline" without any;
"R101-R18" is teacher-student, a run without a teacher is named by its student.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from kd_detectron.errors import ConfigError
from kd_detectron.runs.files import CONFIG, is_finished, read_config, read_metrics, read_result

BASELINE = "baseline"
INHERITED = "inherited"
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
TASKS = {"bbox": "box", "segm": "mask"}


@dataclass(frozen=True)
class Run:
    """One training run, read from its folder.

    Attributes:
        method: distillers joined by "+", or "baseline".
        student, teacher: short backbone names such as "R18"; teacher is None without distillation.
        detector: "Faster R-CNN", "Mask R-CNN", or the meta-architecture's name.
        results: final AP by task ("bbox", "segm") and metric ("AP", "AP50", ...), without NaN.
        history: metrics by iteration, in order of iteration.
        iterations: iterations trained; None if unknown.
        seconds: wall time of the training; None if unknown.
        seed: the run's seed; None or negative: not fixed.
        test_dataset: the dataset that results and history were measured on.
        teacher_folder: the run folder that the teacher's weights come from; None without one.
    """

    path: Path
    method: str
    student: str
    teacher: str | None
    detector: str
    results: Mapping[str, Mapping[str, float]] = field(repr=False)
    history: Mapping[int, Mapping[str, float]] = field(repr=False)
    config: Mapping = field(repr=False)
    iterations: int | None = None
    seconds: float | None = None
    seed: int | None = None
    finished: bool = False
    test_dataset: str | None = None
    teacher_folder: Path | None = None

    @property
    def pair(self) -> str:
        """Teacher and student, "R101-R18", or the student where there is no teacher."""
        return f"{self.teacher}-{self.student}" if self.teacher else self.student

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Returns iterations and values of one metric, without missing and non-finite values."""
        points = [(i, values[key]) for i, values in self.history.items() if key in values]
        points = [(i, value) for i, value in points if _is_number(value)]
        return [i for i, _ in points], [value for _, value in points]

    def loss_names(self) -> list[str]:
        """Returns the names of the losses that the run logged, ``total_loss`` first."""
        names = {key for values in self.history.values() for key in values}
        losses = sorted(name for name in names if name.startswith("loss_"))
        return (["total_loss"] if "total_loss" in names else []) + losses


def load_run(path: str | Path, dataset: str = "") -> Run:
    """Reads one run folder.

    Args:
        path: a Detectron2 ``OUTPUT_DIR`` that holds at least ``config.yaml``.
        dataset: whose AP to read, one of ``DATASETS.TEST``; by default the first.

    Raises:
        ConfigError: the folder or its ``config.yaml`` is missing, a file in it is unreadable, or
            the run was not evaluated on the dataset.
    """
    path = Path(path)
    config = read_config(path)
    datasets = list((config.get("DATASETS") or {}).get("TEST") or [])
    if dataset and dataset not in datasets:
        raise ConfigError(
            f"{path} was not evaluated on '{dataset}': its DATASETS.TEST is {datasets}"
        )
    dataset = dataset or (datasets[0] if datasets else None)
    history = metrics_by_iteration(path)
    if len(datasets) > 1:
        # Detectron2 puts the dataset's name before the metrics of several.
        history = {
            iteration: {key.removeprefix(f"{dataset}/"): values[key] for key in values}
            for iteration, values in history.items()
        }
    finished = is_finished(path)
    # What a finished run reached says nothing of a run that was extended since.
    record = read_result(path) if finished or not history else {}
    results = record.get("results") or {}
    if len(datasets) > 1:
        results = results.get(dataset)
    results = results or _last_evaluation(history)
    taught = has_teacher(config)
    weights = (config.get("KD", {}).get("TEACHER") or {}).get("WEIGHTS") if taught else ""
    folder = Path(weights).parent if weights else None
    return Run(
        path=path,
        method=method_name(config),
        student=backbone_name(config),
        teacher=teacher_name(config) if taught else None,
        detector=detector_name(config),
        results=known_values(results),
        history=history,
        config=config,
        iterations=record.get("iterations") or (max(history) + 1 if history else None),
        seconds=record.get("seconds"),
        seed=record.get("seed", config.get("SEED")),
        finished=finished,
        test_dataset=dataset,
        teacher_folder=folder if folder and (folder / CONFIG).is_file() else None,
    )


def distiller_names(config: Mapping) -> list[str]:
    """Returns the distillers that a config trains with; empty where distillation is off."""
    kd = config.get("KD") or {}
    return list(kd.get("DISTILLERS") or []) if kd.get("ENABLED", False) else []


def inherits(config: Mapping) -> bool:
    """Whether parts of the student started from the teacher's weights."""
    kd = config.get("KD") or {}
    return bool(kd.get("ENABLED", False) and (kd.get("TEACHER") or {}).get("INHERIT"))


def has_teacher(config: Mapping) -> bool:
    """Whether a run had a teacher: to distil from, or to inherit from."""
    return bool(distiller_names(config)) or inherits(config)


def method_name(config: Mapping) -> str:
    """Names what a run took from its teacher: "CKD+ReviewKD", "inherited+PKD", or "baseline"."""
    parts = [INHERITED] if inherits(config) else []
    return "+".join([*parts, *sorted(distiller_names(config), key=str.lower)]) or BASELINE


def detector_name(config: Mapping) -> str:
    """Names the detector as the papers do."""
    model = config["MODEL"]
    architecture = model.get("META_ARCHITECTURE", "GeneralizedRCNN")
    if architecture not in ("GeneralizedRCNN", "DistilledRCNN"):
        return architecture.removeprefix("Distilled")
    return "Mask R-CNN" if model.get("MASK_ON") else "Faster R-CNN"


def backbone_name(config: Mapping) -> str:
    """Returns a config's backbone in short: "R50", "X101", "MV2", or its builder's name."""
    model = config["MODEL"]
    name = model.get("BACKBONE", {}).get("NAME", "")
    builder = name.removeprefix("build_").removesuffix("_backbone").removesuffix("_fpn")
    if "mobilenet" in builder and "v2" in builder:
        width = model.get("MOBILENETV2", {}).get("WIDTH_MULT", 1.0)
        return "MV2" if width == 1 else f"MV2x{width:g}"
    library = builder.removeprefix("retinanet_")
    if library in ("timm", "torchvision"):
        return model[library.upper()]["NAME"]
    if builder.endswith("resnet"):
        resnet = model.get("RESNETS", {})
        letter = "X" if resnet.get("NUM_GROUPS", 1) > 1 else "R"
        return f"{letter}{resnet.get('DEPTH', '')}"
    return builder or "unknown"


def torchvision_name(detector: str, options: Mapping = {}) -> str:
    """The backbone of a torchvision detector in short: "R50", "MV2x0.25", or the network's name.

    Args:
        detector: its name, such as "fasterrcnn_resnet50_fpn_v2".
        options: those that it is built with.
    """
    network = re.sub(r"^[a-z]+_(.+?)_fpn.*$", r"\1", detector)
    if found := re.fullmatch(r"resnet(\d+)", network):
        return f"R{found[1]}"
    if found := re.fullmatch(r"mobilenet_v(\d).*", network):
        width = options.get("network", {}).get("width_mult", 1.0)
        return f"MV{found[1]}" + ("" if width == 1 else f"x{width:g}")
    return network


def teacher_name(config: Mapping) -> str:
    """Returns the short name of the teacher that ``KD.TEACHER.CONFIG_FILE`` names.

    In a torchvision run it is the name of a detector, or the ``config.yaml`` of the teacher's run.
    Zoo names and this project's names carry the backbone ("faster_rcnn_R_101_FPN_3x"); another
    file, such as the ``config.yaml`` of a run, is opened.
    """
    node = config.get("KD", {}).get("TEACHER") or {}
    file = node.get("CONFIG_FILE") or ""
    if config.get("ENGINE") == "torchvision" and not file.endswith(".yaml"):
        return torchvision_name(file, node.get("OPTIONS") or {}) or "unknown"
    stem = Path(file).stem
    found = re.findall(r"(?:^|[_-])([RX])_?(\d{2,3})(?=[_-]|$)", stem, flags=re.IGNORECASE)
    if found:
        # A distilled model's name holds its own teacher before it: the last one is the model.
        return found[-1][0].upper() + found[-1][1]
    if re.search(r"(^|[_-])mv2([_-]|$)", stem, flags=re.IGNORECASE):
        return "MV2"
    if Path(file).suffix == ".yaml" and Path(file).is_file():
        teacher = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        if isinstance(teacher, dict) and teacher.get("MODEL", {}).get("BACKBONE", {}).get("NAME"):
            return backbone_name(teacher)
    return stem or "unknown"


def metrics_by_iteration(folder: str | Path) -> dict[int, dict[str, float]]:
    """Returns a run's metrics by iteration, in order of iteration.

    Several records of one iteration are merged, the later one wins: that is what a resumed run
    leaves.
    """
    history: dict[int, dict[str, float]] = {}
    for record in read_metrics(folder):
        history.setdefault(record.pop("iteration"), {}).update(record)
    return dict(sorted(history.items()))


def _last_evaluation(history: Mapping[int, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Returns the AP of the last iteration that was evaluated."""
    for values in reversed(list(history.values())):
        if any(f"{task}/AP" in values for task in TASKS):
            return {task: {m: values.get(f"{task}/{m}") for m in METRICS} for task in TASKS}
    return {}


def known_values(results: object) -> dict[str, dict[str, float]]:
    """Keeps the known tasks of evaluation results, and their values that are finite numbers."""
    known = {}
    for task in TASKS:
        values = results.get(task) if isinstance(results, Mapping) else None
        if isinstance(values, Mapping):
            known[task] = {m: float(values[m]) for m in METRICS if _is_number(values.get(m))}
    return {task: values for task, values in known.items() if values}


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
