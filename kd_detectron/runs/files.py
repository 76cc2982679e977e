"""The files of a run folder (Detectron2's ``OUTPUT_DIR``): their names, how they are read.

- ``config.yaml``: the whole config, written by Detectron2 at the start.
- ``metrics.json``: JSON lines of losses and AP, written during training.
- ``result.json``: final AP, iterations and sizes, written at the end of the training.
- ``last_checkpoint``: the name of the newest checkpoint in the folder.
- ``student_final.pth``, ``model_final.pth``: the exported student and the last checkpoint.

Files only: works where Detectron2 is not installed.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from kd_detectron.atomic_files import atomic_open
from kd_detectron.errors import ConfigError

CONFIG = "config.yaml"
METRICS = "metrics.json"
RESULT = "result.json"
LAST_CHECKPOINT = "last_checkpoint"
# The checkpoints of a finished run, in the order in which pictures take them.
FINAL_CHECKPOINTS = ("student_final.pth", "model_final.pth")


def read_config(folder: str | Path) -> dict:
    """Returns a run's config as plain dicts and lists.

    Raises:
        ConfigError: the folder or its ``config.yaml`` is missing, or it is no Detectron2 config.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a run folder: there is no such directory")
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError(f"{folder} is not a run folder: it holds no {CONFIG}")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("MODEL"), dict):
        raise ConfigError(f"{path} is not a Detectron2 config: it has no MODEL")
    return config


def flatten(config: Mapping, prefix: str = "") -> dict[str, object]:
    """Returns the values of a nested config by their dotted keys, such as "SOLVER.BASE_LR"."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def read_metrics(folder: str | Path) -> list[dict]:
    """Returns the records of a run's ``metrics.json``, as :func:`parse_record` reads them.

    A line that a killed process left half-written is skipped; without a file there are none.
    """
    path = Path(folder) / METRICS
    if not path.is_file():
        return []
    with path.open("rb") as file:
        return [record for record in map(parse_record, file) if record is not None]


def parse_record(line: bytes) -> dict | None:
    """One line of ``metrics.json``; None for a line that was cut short."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    complete = isinstance(record, dict) and isinstance(record.get("iteration"), int)
    return record if complete else None


def forget_metrics_from(folder: str | Path, iteration: int) -> None:
    """Cuts ``metrics.json`` at the first record of an iteration that will be run (again)."""
    path = Path(folder) / METRICS
    if not path.is_file():
        return
    kept = 0
    with path.open("rb") as file:
        for line in file:
            record = parse_record(line)
            if record is None or record["iteration"] >= iteration:
                break
            kept += len(line)
    # In place, since a writer may already hold the file open for appending.
    os.truncate(path, kept)


def read_result(folder: str | Path) -> dict:
    """Returns a run's ``result.json``, {} where it is missing.

    Raises:
        ConfigError: it is no JSON object, or what is read of it is of a wrong type.
    """
    path = Path(folder) / RESULT
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: None)
    except ValueError:
        record = None
    types = {"results": dict, "iterations": int, "seconds": int | float, "seed": int}
    if not isinstance(record, dict) or any(
        not isinstance(record.get(key), types[key] | None) for key in types
    ):
        raise ConfigError(
            f"{path} is not what a training writes: {path.read_text(errors='replace')[:200]!r}; "
            "remove it to use the last evaluation in metrics.json instead"
        )
    return record


def write_result(folder: str | Path, record: Mapping) -> None:
    """Writes ``result.json``, complete or not at all.

    Values that are not finite, Detectron2's NaN for an AP without objects, become null.
    """
    with atomic_open(os.path.join(folder, RESULT), "w") as file:
        json.dump(_without_nan(record), file, indent=1, allow_nan=False)


def _without_nan(value):
    if isinstance(value, Mapping):
        return {key: _without_nan(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_finished(folder: str | Path) -> bool:
    """Whether a run reached its end: ``result.json`` says so, and nothing was trained since."""
    result = read_result(folder)
    if not result.get("finished"):
        return False
    last = max((record["iteration"] for record in read_metrics(folder)), default=0)
    # The last evaluation is recorded one iteration after the last step.
    iterations = result.get("iterations")
    return iterations is None or last <= iterations


def last_checkpoint(folder: str | Path) -> Path | None:
    """Returns the newest checkpoint of a run, which ``last_checkpoint`` names; None without one."""
    tag = Path(folder) / LAST_CHECKPOINT
    if not tag.is_file():
        return None
    return Path(folder) / tag.read_text(encoding="utf-8").strip()
