"""A study: a list of runs through the ordinary trainer, then one table and the figures.

A study file (``configs/studies/*.yaml``) names an output folder and its runs, in order::

    output: output/bccd_study
    runs:
      - {name: teacher, config: bccd/teacher_r50.yaml}
      - {name: baseline, config: bccd/baseline_r18.yaml, seeds: [1, 2, 3]}
      - {name: ckd, config: bccd/ckd_r18.yaml, seeds: [1, 2, 3], opts: [KD.CKD.WEIGHT, 0.1]}

Each run is its own process and its own folder, ``<output>/<name>`` or ``<output>/<name>/seed<N>``;
the first seeds of all runs come first, then the second ones.
Finished runs (``result.json``) are skipped, interrupted ones resumed, failed ones named and left
for the next start. ``{output}`` in an option stands for the study's folder, so that a student can
name the teacher's checkpoint. ``--jobs N`` has N runs going at a time, in the file's order but for
students, which wait for the run that makes their teacher. ``expected: FILE`` names the AP ranges
that an earlier study reached (``--write-expected``); a finished run outside its range is named and
makes the command fail. A file with ``part_of: STUDY``, ``only: [names]``, ``seeds: [numbers]`` is
that part of another study, in the same folders: what one has finished the other skips.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from tqdm import tqdm

from kd_detectron.commands import FAILED_EXIT_CODE, INTERRUPTED_EXIT_CODE, USER_ERROR_EXIT_CODE
from kd_detectron.config import config_dir, get_config
from kd_detectron.errors import ConfigError, did_you_mean
from kd_detectron.runs.files import read_metrics
from kd_detectron.runs.run import Run, load_run
from kd_detectron.studies.expected import outside_expected, write_expected
from kd_detectron.studies.report import TEACHER, write_report

STUDY_KEYS = {"output", "opts", "runs", "expected"}
PART_KEYS = {"part_of", "only", "seeds", "output", "opts", "expected"}
# glibc returns freed memory to the system and has it mapped anew in the next step, which can cost
# time on the CPU (docs/performance.md).
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
RUN_KEYS = {"name", "config", "seeds", "opts"}


@dataclass
class StudyRun:
    """One training of a study.

    Args:
        name: what tables and figures call it.
        config: a config by path or bare name.
        folder: its output folder.
        opts: KEY VALUE overrides.
        max_iter: its iterations.
        teacher_weights: the checkpoint that it distils from; empty where it does not distil.
    """

    name: str
    config: str
    folder: Path
    opts: list = field(default_factory=list)
    max_iter: int = 0
    teacher_weights: str = ""

    @property
    def finished(self) -> bool:
        return (self.folder / "result.json").is_file()

    def iterations_done(self) -> int:
        """Iterations so far, from the run's metrics."""
        records = read_metrics(self.folder)
        done = max((int(record["iteration"]) + 1 for record in records), default=0)
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
    """Reads and checks a study file, given as a path or by bare name.

    Raises:
        ConfigError: no such file, an unknown key, or a config that does not exist.
    """
    path, content = _read_study(file)
    folder = Path(output or content["output"])
    runs = []
    for entry in content["runs"]:
        for key in entry.keys() - RUN_KEYS:
            raise ConfigError(
                f"study '{file}': {key} is no key of a run{did_you_mean(key, RUN_KEYS)}"
            )
        opts = [str(o).replace("{output}", str(folder)) for o in content.get("opts", [])]
        opts += [str(o).replace("{output}", str(folder)) for o in entry.get("opts", [])]
        for turn, seed in enumerate(entry.get("seeds", [None])):
            run = StudyRun(
                name=entry["name"],
                config=entry["config"],
                folder=folder / entry["name"] / ("" if seed is None else f"seed{seed}"),
                opts=[*opts, *([] if seed is None else ["SEED", str(seed)])],
            )
            cfg = get_config(run.config, run.opts)
            run.max_iter = cfg.SOLVER.MAX_ITER
            if cfg.KD.ENABLED and cfg.KD.DISTILLERS:
                run.teacher_weights = cfg.KD.TEACHER.WEIGHTS
            runs.append((turn, run))
    # Every run's first seed, then the second ones: a study that is stopped has a whole table.
    runs = [run for _, run in sorted(runs, key=lambda pair: pair[0])]
    expected = path.parent / content["expected"] if "expected" in content else None
    if expected and not expected.is_file():
        raise ConfigError(f"study '{file}': expected is {expected}, which is not there")
    return Study(folder, runs, expected)


def _read_study(file: str) -> tuple[Path, dict]:
    """The path and content of a study file; of a part of a study, those of the whole, cut down."""
    path = Path(file)
    if not path.is_file():
        path = config_dir() / "studies" / file
    if not path.is_file():
        known = sorted(p.name for p in (config_dir() / "studies").glob("*.yaml"))
        raise ConfigError(f"study '{file}' is neither a file nor known{did_you_mean(file, known)}")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    known_keys = PART_KEYS if "part_of" in content else STUDY_KEYS
    for key in content.keys() - known_keys:
        raise ConfigError(f"study '{file}' has an unknown key {key}{did_you_mean(key, known_keys)}")
    if "part_of" not in content:
        return path, content
    whole_path, whole = _read_study(content["part_of"])
    for key in ("opts", "expected"):
        if key in content and "output" not in content:
            raise ConfigError(
                f"study '{file}' has {key} but no output, so its runs would be those of "
                f"{whole_path}; give it an output folder of its own"
            )
    names = [entry["name"] for entry in whole["runs"]]
    only = content.get("only", names)
    for name in only:
        if name not in names:
            raise ConfigError(
                f"study '{file}': {name} is no run of {whole_path}{did_you_mean(name, names)}"
            )
    runs = [dict(entry) for entry in whole["runs"] if entry["name"] in only]
    for entry in runs:
        if "seeds" in entry and "seeds" in content:
            entry["seeds"] = [seed for seed in entry["seeds"] if seed in content["seeds"]]
        entry["opts"] = [*entry.get("opts", []), *content.get("opts", [])]
    if "output" not in content:
        return whole_path, whole | {"runs": runs}
    # Runs of their own: the whole's expected ranges are not theirs.
    own = {key: content[key] for key in ("output", "expected") if key in content}
    return path, {"opts": whole.get("opts", []), **own, "runs": runs}


def run_study(study: Study, jobs: int = 1) -> list[StudyRun]:
    """Runs what is not finished yet; returns the runs that failed.

    Args:
        study: the runs, in the order in which they start.
        jobs: how many runs go at a time; the machine's cores are shared out among them.

    Raises:
        KeyboardInterrupt: the current runs wrote their checkpoints; the same command goes on.
    """
    todo = [run for run in study.runs if not run.finished]
    active: list[_ActiveRun] = []
    failed = []
    total = sum(run.max_iter for run in study.runs)
    started, done_before = time.monotonic(), sum(r.iterations_done() for r in study.runs)
    # A cluster's SIGTERM is to end the trainings in order, as Ctrl-C does.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while todo or active:
            while len(active) < jobs and (run := _next_run(todo, active)):
                todo.remove(run)
                done = sum(r.iterations_done() for r in study.runs)
                number = study.runs.index(run) + 1
                left = _time_left(started, done_before, done, total)
                tqdm.write(f"[{number}/{len(study.runs)}] {run.folder}{left}")
                active.append(_ActiveRun(run, threads=max(1, (os.cpu_count() or 1) // jobs)))
            time.sleep(1)
            for one in list(active):
                code = one.poll()
                if code is None:
                    continue
                active.remove(one)
                if code == INTERRUPTED_EXIT_CODE:
                    raise KeyboardInterrupt
                if code:
                    failed.append(one.run)
                    log = console(one.run)
                    tqdm.write(
                        f"FAILED with exit code {code}: {one.run.folder}; last lines of {log}:"
                    )
                    tqdm.write("".join(f"    {line}\n" for line in last_lines(log)))
                else:
                    tqdm.write(f"done: {one.run.folder}, {one.shown}")
    finally:
        # Only after an interrupt are there any: each writes its checkpoint and ends.
        for one in active:
            one.stop()
        signal.signal(signal.SIGTERM, previous)
    return failed


def _next_run(todo: Sequence[StudyRun], active: Sequence["_ActiveRun"]) -> StudyRun | None:
    """The first run whose teacher is not still to come from another run of the study."""
    coming = [*todo, *(one.run for one in active)]
    for run in todo:
        others = [other.folder for other in coming if other is not run]
        if not (run.teacher_weights and Path(run.teacher_weights).parent in others):
            return run
    return None


def _time_left(started: float, done_before: int, done: int, total: int) -> str:
    if done <= done_before:
        return ""
    seconds = (time.monotonic() - started) / (done - done_before) * (total - done)
    return f", about {seconds / 60:.0f} min left in the study"


class _ActiveRun:
    """One training as a process with a progress bar.

    Args:
        run: what to train; its folder is made.
        threads: its OpenMP threads, where the environment does not say how many.
    """

    def __init__(self, run: StudyRun, threads: int):
        self.run = run
        run.folder.mkdir(parents=True, exist_ok=True)
        command = [
            *(sys.executable, "-m", "kd_detectron.engine.main"),
            *("--config-file", run.config, "--resume"),
            *run.opts,
            *("OUTPUT_DIR", str(run.folder)),
        ]
        with open(console(run), "ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": str(threads), **KEEP_FREED_MEMORY, **os.environ},
            )
        name = "/".join(run.folder.parts[-2:]) if run.folder.name != run.name else run.name
        # disable=None: no bars in a file, which one line for each run suits better.
        self._bar = tqdm(
            total=run.max_iter,
            initial=run.iterations_done(),
            unit="it",
            desc=name,
            disable=None,
        )
        self.shown = ""

    def poll(self) -> int | None:
        """Moves the progress bar on; returns the exit code, None while the process runs."""
        code = self._process.poll()
        records = read_metrics(self.run.folder)
        if records:
            self._bar.update(self.run.iterations_done() - self._bar.n)
            aps = [r["bbox/AP"] for r in records if "bbox/AP" in r]
            shown = {"loss": records[-1].get("total_loss"), "AP": aps[-1] if aps else None}
            self.shown = ", ".join(f"{k}={v:.3g}" for k, v in shown.items() if v is not None)
            self._bar.set_postfix_str(self.shown)
        if code is not None:
            self._bar.close()
        return code

    def stop(self) -> None:
        """Has the training write its checkpoint and end; waits for it."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()
        self._bar.close()


def console(run: StudyRun) -> Path:
    """The file that holds what a run printed."""
    return run.folder / "console.log"


def last_lines(path: Path, count: int = 5) -> list[str]:
    """The last lines of a text file."""
    return path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]


def report(study: Study) -> None:
    """Prints the table of the finished runs and writes table and figures into the study's folder.

    The teacher of the table and the pictures is the run named "teacher", or else the finished run
    that all distilled students of the study have their teacher from.
    """
    students = study.finished_runs()
    own = students.pop(TEACHER, [None])[0]
    if students:
        teacher = own.path if own else teacher_of_others(study)
        print(write_report(study.output, students, teacher=teacher))
        print(f"\ntable and pictures: {study.output}")


def teacher_of_others(study: Study) -> Path | None:
    """The folder of the one finished run whose weights teach all distilled runs, if that is so."""
    folders = {Path(run.teacher_weights).parent for run in study.runs if run.teacher_weights}
    folder = folders.pop() if len(folders) == 1 else None
    return folder if folder and (folder / "result.json").is_file() else None


def main(argv: Sequence[str] | None = None) -> int:
    """What ``tools/run_study.py`` does; returns the exit code."""
    parser = argparse.ArgumentParser(description="Runs a list of trainings and compares them.")
    parser.add_argument("study", help="a study file, by path or by name in configs/studies")
    parser.add_argument("--output", help="another output folder than the file's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument(
        "--write-expected", metavar="FILE", help="record the APs as ranges for later studies"
    )
    args = parser.parse_args(argv)
    try:
        study = load_study(args.study, args.output)
        failed = run_study(study, jobs=args.jobs)
        report(study)
        if args.write_expected:
            write_expected(args.write_expected, study.finished_runs())
        outside = outside_expected(study.expected, study.finished_runs()) if study.expected else []
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_EXIT_CODE
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    if failed:
        names = ", ".join(str(run.folder) for run in failed)
        print(f"{len(failed)} runs failed: {names}; the same command tries them again")
    for sentence in outside:
        print(f"not as expected: {sentence}")
    return FAILED_EXIT_CODE if failed or outside else 0


if __name__ == "__main__":
    sys.exit(main())
