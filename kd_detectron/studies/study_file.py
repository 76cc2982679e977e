"""Reads and checks a study file: which runs, with which configs and options, in which folders.

A study file (``configs/studies/*.yaml``; the format is in ``docs/studies.md``) names an output
folder and its runs, in order::

    output: output/bccd_study
    defaults: {config: bccd/ckd_reviewkd_r18.yaml, seeds: [1, 2, 3]}
    runs:
      - {name: teacher, config: bccd/teacher_r50.yaml, seeds: null}
      - {name: ckd_reviewkd}
      - {name: ckd, opts: [KD.DISTILLERS, "['CKD']"]}
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from kd_detectron.config import config_dir, get_config
from kd_detectron.errors import ConfigError, did_you_mean
from kd_detectron.precision import slow_precision
from kd_detectron.runs.files import (
    CONFIG,
    is_finished,
    last_checkpoint,
    read_config,
    read_metrics,
)
from kd_detectron.runs.groups import experiment
from kd_detectron.runs.run import Run, load_run
from kd_detectron.runs.same_run import config_of_run

DEFAULT_KEYS = {"config": str, "seeds": list, "opts": list}
RUN_KEYS = {"name": str, "against": str, **DEFAULT_KEYS}
OWN_KEYS = {"output": str, "opts": list, "expected": str}
STUDY_KEYS = {"defaults": dict, "runs": list, **OWN_KEYS}
PART_KEYS = {"part_of": str, "only": list, "seeds": list, **OWN_KEYS}


@dataclass
class StudyRun:
    """One training of a study.

    ``teacher_weights`` is the checkpoint that it distils or inherits from; empty without a teacher.
    ``against`` is the row that it is compared with beside the baseline, if any. ``warning`` says
    why it will be slow on this machine, if it will.
    """

    name: str
    config: str
    folder: Path
    opts: list = field(default_factory=list)
    max_iter: int = 0
    teacher_weights: str = ""
    against: str = ""
    warning: str | None = None

    @property
    def finished(self) -> bool:
        return is_finished(self.folder)

    @property
    def interrupted(self) -> bool:
        """Whether the folder holds a run to go on with, and what it was started with."""
        resumable = last_checkpoint(self.folder) is not None
        return resumable and not self.finished and bool(config_of_run(str(self.folder)))

    def iterations_done(self) -> int:
        """Iterations so far, from the run's metrics."""
        done = max((record["iteration"] + 1 for record in read_metrics(self.folder)), default=0)
        # The last evaluation is recorded one iteration after the last step.
        return min(done, self.max_iter)


@dataclass
class Study:
    """A study as read from its file."""

    output: Path
    runs: list[StudyRun]
    expected: Path | None = None

    def finished_runs(self) -> dict[str, list[Run]]:
        """The results of the finished runs (seeds) by name."""
        results: dict[str, list[Run]] = {}
        for run in self.runs:
            if run.finished:
                results.setdefault(run.name, []).append(load_run(run.folder))
        return results


def load_study(file: str, output: str | None = None) -> Study:
    """Reads and checks a study file, by path or by its bare name in ``configs/studies``.

    Args:
        file: the study file.
        output: another output folder than the file's.

    Raises:
        ConfigError: there is no such file, something in it is wrong, a config or option does not
            exist, or a run was started with other options.
    """
    path, content = _read_study(file)
    folder = Path(output or content["output"])
    runs = []
    for entry in content["runs"]:
        where = f"study '{file}', run '{entry['name']}'"
        opts = [_fill_in(str(value), folder, where) for value in entry["opts"]]
        for turn, seed in enumerate(entry["seeds"] or [None]):
            run = StudyRun(
                name=entry["name"],
                config=entry["config"],
                folder=folder / entry["name"] / ("" if seed is None else f"seed{seed}"),
                opts=[*opts, *([] if seed is None else ["SEED", str(seed)])],
                against=entry.get("against", ""),
            )
            try:
                cfg = get_config(run.config, run.opts)
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from error
            run.max_iter = cfg.SOLVER.MAX_ITER
            run.warning = slow_precision(cfg)
            if cfg.KD.ENABLED and (cfg.KD.DISTILLERS or cfg.KD.TEACHER.INHERIT):
                run.teacher_weights = cfg.KD.TEACHER.WEIGHTS
            if run.finished or run.interrupted:
                _check_unchanged(run, yaml.safe_load(cfg.dump()), folder, where)
            runs.append((turn, run))
    # Every run's first seed, then the second ones: a study that is stopped has a whole table.
    runs = [run for _, run in sorted(runs, key=lambda pair: pair[0])]
    if not runs:
        raise ConfigError(f"study '{file}' has no runs; name at least one under runs")
    expected = path.parent / content["expected"] if "expected" in content else None
    if expected and not expected.is_file():
        raise ConfigError(f"study '{file}': expected is {expected}, which is not there")
    return Study(folder, runs, expected)


def _read_study(file: str, parts: tuple[Path, ...] = ()) -> tuple[Path, dict]:
    """The path and content of a study file, every run with its config, seeds and opts.

    Of a part of a study it is the content of the whole, cut down; ``parts`` are the files that led
    to this one.
    """
    path = Path(file) if Path(file).is_file() else config_dir() / "studies" / file
    if not path.is_file():
        known = sorted(p.name for p in (config_dir() / "studies").glob("*.yaml"))
        raise ConfigError(f"study '{file}' is neither a file nor known{did_you_mean(file, known)}")
    where = f"study '{file}'"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} is not readable YAML: {error}") from error
    if "part_of" not in content:
        _check_keys(content, STUDY_KEYS, where, needed=("output", "runs"))
        return path, content | {"runs": _runs(content, where)}
    _check_keys(content, PART_KEYS, where)
    if path in parts:
        raise ConfigError(f"{where} is part_of itself; name the study that it is a part of")
    beside = path.parent / content["part_of"]
    whole_file = str(beside) if beside.is_file() else content["part_of"]
    whole_path, whole = _read_study(whole_file, (*parts, path))
    runs = _part(content, whole["runs"], f"{where}, part of {whole_path}")
    if "output" not in content:
        return whole_path, whole | {"runs": runs}
    # Runs of their own: the whole's expected ranges are not theirs.
    return path, {key: content[key] for key in OWN_KEYS if key in content} | {"runs": runs}


def _runs(content: dict, where: str) -> list[dict]:
    """The runs of a study, each with its own keys or the defaults."""
    defaults = content.get("defaults", {})
    _check_keys(defaults, DEFAULT_KEYS, f"{where}, defaults")
    runs, names = [], []
    for number, entry in enumerate(content["runs"], start=1):
        _check_keys(entry, RUN_KEYS, f"{where}, run {number}", needed=("name",))
        if entry["name"] in names:
            raise ConfigError(
                f"{where} has 2 runs named '{entry['name']}'; give each a name of its own"
            )
        names.append(entry["name"])
        run = {"seeds": None} | defaults | entry
        if "config" not in run:
            raise ConfigError(f"{where}, run '{entry['name']}' has no config; add it")
        run["opts"] = [v for part in (content, defaults, entry) for v in part.get("opts", [])]
        runs.append(run)
    for run in runs:
        if run.get("against", run["name"]) not in names:
            near = did_you_mean(run["against"], names)
            raise ConfigError(
                f"{where}, run '{run['name']}': against is '{run['against']}', none of its "
                f"runs{near}"
            )
    return runs


def _part(content: dict, whole: list[dict], where: str) -> list[dict]:
    """The runs of a part of a study."""
    for key in ("opts", "expected"):
        if key in content and "output" not in content:
            raise ConfigError(
                f"{where}, has {key} but no output, so its runs would be those of the whole; give "
                "it an output folder of its own"
            )
    names = [entry["name"] for entry in whole]
    only, seeds, runs = content.get("only", names), content.get("seeds"), []
    for name in only:
        if name not in names:
            raise ConfigError(
                f"{where}: {name} is none of its runs{did_you_mean(str(name), names)}"
            )
    for entry in whole:
        run = entry | {"opts": [*entry["opts"], *content.get("opts", [])]}
        if entry["seeds"] and seeds:
            run["seeds"] = [seed for seed in entry["seeds"] if seed in seeds]
            if not run["seeds"]:
                raise ConfigError(
                    f"{where}: seeds is {seeds}, and '{entry['name']}' has {entry['seeds']}"
                )
        if entry["name"] in only:
            runs.append(run)
    return runs


def _check_keys(
    content: object, known: Mapping[str, type], where: str, *, needed: tuple[str, ...] = ()
) -> None:
    """Refuses unknown keys, missing ones, values of a wrong type and opts that are no pairs."""
    if not isinstance(content, dict):
        raise ConfigError(f"{where} is {content!r}; it must be a mapping of keys")
    for key, value in content.items():
        if key not in known:
            raise ConfigError(f"{where} has an unknown key {key}{did_you_mean(str(key), known)}")
        if not isinstance(value, known[key]) and not (key == "seeds" and value is None):
            words = {str: "a text", list: "a list", dict: "a mapping of keys"}
            raise ConfigError(f"{where}: {key} is {value!r}; it must be {words[known[key]]}")
    for key in needed:
        if key not in content:
            raise ConfigError(f"{where} has no {key}; add it")
    if len(content.get("opts", [])) % 2:
        raise ConfigError(
            f"{where}: opts has {len(content['opts'])} entries; they come in pairs of KEY VALUE"
        )
    seeds = content.get("seeds") or []
    if any(not isinstance(seed, int) or seed < 0 or seeds.count(seed) > 1 for seed in seeds):
        raise ConfigError(
            f"{where}: seeds is {seeds}; they must be different whole numbers, 0 or more"
        )


def _fill_in(value: str, folder: Path, where: str) -> str:
    """Puts the study's folder in the place of ``{output}``."""
    for name in re.findall(r"\{([A-Za-z_]\w*)\}", value):
        if name != "output":
            raise ConfigError(
                f"{where}: '{value}' has the unknown placeholder {{{name}}}; the one that there is "
                "is {output}, the study's folder"
            )
    return value.replace("{output}", str(folder))


def _check_unchanged(run: StudyRun, config: dict, output: Path, where: str) -> None:
    """Refuses a run whose options in the file are not those that it was started with.

    Keys that only one of the two configs has come from another version and are left out, and so
    are where the study's folder lies and how often the run was evaluated and saved.
    """
    trained = read_config(run.folder)
    own_folder = str(run.folder.relative_to(output))
    before = _without_home(trained, str(trained.get("OUTPUT_DIR", "")).removesuffix(own_folder))
    after = _without_home(config, str(run.folder).removesuffix(own_folder))
    changed = [
        f"{key} {before[key]} (the file: {after[key]})"
        for key in sorted(before.keys() & after.keys())
        if before[key] != after[key]
    ]
    if changed:
        raise ConfigError(
            f"{where}: the run {run.folder} was started with {', '.join(changed)}; give "
            "the row another name or the study another output, or remove the folder to train it "
            f"again ({run.folder / CONFIG} says what it was started with)"
        )


def _without_home(config: dict, home: str) -> dict[str, str]:
    """A config's values by dotted key, paths below ``home`` written relative to "{output}"."""
    texts = experiment(config) | {"SEED": str(config.get("SEED"))}
    return {
        key: "{output}/" + text.removeprefix(home) if home and text.startswith(home) else text
        for key, text in texts.items()
    }
