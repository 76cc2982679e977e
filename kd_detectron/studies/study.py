"""Runs a study: its runs through the ordinary trainer, then one table and the figures.

Each run of a study file (:mod:`kd_detectron.studies.study_file`, ``docs/studies.md``) is its own
process and its own folder, ``<output>/<name>`` or ``<output>/<name>/seed<N>``; the first seeds of
all runs come first, then the second ones. Finished runs are skipped, interrupted ones resumed,
failed ones named and left for the next start. ``--jobs N`` has N runs going at a time, in the
file's order but for students, which wait for the run that makes their teacher.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from kd_detectron.commands import (
    FAILED_EXIT_CODE,
    INTERRUPTED_EXIT_CODE,
    USER_ERROR_EXIT_CODE,
    add_import_option,
    import_user_code,
)
from kd_detectron.errors import ConfigError
from kd_detectron.runs.files import is_finished, read_metrics
from kd_detectron.runs.groups import TEACHER
from kd_detectron.runs.tables import published_numbers
from kd_detectron.studies.expected import outside_expected, write_expected
from kd_detectron.studies.study_file import Study, StudyRun, load_study
from kd_detectron.visualize.models import choose_records, dataset_records, load_models
from kd_detectron.visualize.predictions import draw_predictions
from kd_detectron.visualize.report import write_table_and_curves

# glibc returns freed memory to the system and has it mapped anew in the next step, which can cost
# time on the CPU (docs/benchmarking.md).
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
# What the progress bars show of metrics.json.
SHOWN = {"total_loss": "loss", "bbox/AP": "AP"}


def run_study(study: Study, jobs: int = 1, imports: Sequence[str] = ()) -> list[StudyRun]:
    """Runs what is not finished yet; returns the runs that failed.

    Args:
        study: the runs, in the order in which they start.
        jobs: how many runs go at a time; the machine's cores are shared out among them.
        imports: what each training is given as ``--import``.

    Raises:
        ConfigError: ``jobs`` is less than 1, or runs wait for each other as teachers.
        KeyboardInterrupt: the current runs wrote their checkpoints; the same command continues.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs is {jobs}; give at least 1")
    todo = [run for run in study.runs if not run.finished]
    active: list[_ActiveRun] = []
    failed = []
    # A cluster's SIGTERM is to end the trainings in order, as Ctrl-C does.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while todo or active:
            while len(active) < jobs and (run := _next_run(todo, active)):
                todo.remove(run)
                tqdm.write(f"[{study.runs.index(run) + 1}/{len(study.runs)}] {run.folder}")
                threads = max(1, (os.cpu_count() or 1) // jobs)
                active.append(_ActiveRun(run, threads, imports))
            if not active:
                names = ", ".join(str(run.folder) for run in todo)
                raise ConfigError(
                    f"the runs {names} wait for each other: KD.TEACHER.WEIGHTS of each lies in the "
                    "folder of another; give one of them another teacher"
                )
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
                    lines = one.log.read_text(encoding="utf-8", errors="replace").splitlines()
                    what = f"{one.run.folder}; last lines of {one.log}:"
                    tqdm.write(
                        "\n    ".join([f"FAILED with exit code {code}: {what}", *lines[-5:]])
                    )
                else:
                    tqdm.write(f"done: {one.run.folder}, {one.shown}")
    finally:
        # Runs are active here only after an interrupt: each writes its checkpoint and ends.
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


class _ActiveRun:
    """One training as a process with a progress bar.

    Args:
        run: what to train; its folder is made.
        threads: its OpenMP threads, where the environment does not say how many.
        imports: the user's files or modules that it imports first.
    """

    def __init__(self, run: StudyRun, threads: int, imports: Sequence[str]):
        self.run = run
        self.shown = ""
        self.log = run.folder / "console.log"
        run.folder.mkdir(parents=True, exist_ok=True)
        command = [
            *(sys.executable, "-m", "kd_detectron.engine.main"),
            *("--config-file", run.config, "--resume"),
            *(argument for name in imports for argument in ("--import", name)),
            *run.opts,
            *("OUTPUT_DIR", str(run.folder)),
        ]
        environment = {"OMP_NUM_THREADS": str(threads), **KEEP_FREED_MEMORY, **os.environ}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        # disable=None: no bars in a file, which one line for each run suits better.
        start = run.iterations_done()
        self._bar = tqdm(total=run.max_iter, initial=start, desc=run.name, unit="it", disable=None)

    def poll(self) -> int | None:
        """Moves the progress bar on; returns the exit code, None while the process runs."""
        code = self._process.poll()
        records = read_metrics(self.run.folder)
        self._bar.update(self.run.iterations_done() - self._bar.n)
        # The last value of each.
        values = {key: record[key] for record in records for key in SHOWN if key in record}
        self.shown = ", ".join(f"{SHOWN[key]}={value:.3g}" for key, value in values.items())
        self._bar.set_postfix_str(self.shown)
        if code is not None:
            self._bar.close()
        return code

    def stop(self) -> None:
        """Has the training write its checkpoint and end; waits for it."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()
        self._bar.close()


def report(study: Study) -> None:
    """Prints the table of the finished runs and writes table and figures into the study's folder.

    The teacher of the table and the pictures is the run named "teacher", or else the finished run
    that all distilled students of the study have their teacher from.
    """
    students = study.finished_runs()
    own = students.pop(TEACHER, [None])[0]
    if not students:
        return
    teacher = own.path if own else teacher_of_others(study)
    folder, published = study.output, published_numbers()
    against = {run.name: run.against for run in study.runs if run.against}
    print(
        write_table_and_curves(
            folder, students, teacher=teacher, published=published, against=against
        )
    )
    # Detections of the first run of each combination of distillers.
    first = {runs[0].method: (runs[0].path, name) for name, runs in reversed(students.items())}
    folders, labels = zip(*reversed(first.values()), strict=True)
    models = load_models(folders, labels=labels, teacher=teacher)
    records, class_names = dataset_records(models[-1].cfg)
    draw_predictions(models, choose_records(records, 4), class_names, folder / "predictions.png")
    print(f"\ntable and pictures: {folder}")


def teacher_of_others(study: Study) -> Path | None:
    """The folder of the one finished run whose weights teach all distilled runs, if that is so."""
    folders = {Path(run.teacher_weights).parent for run in study.runs if run.teacher_weights}
    folder = folders.pop() if len(folders) == 1 else None
    return folder if folder and is_finished(folder) else None


def main(argv: Sequence[str] | None = None) -> int:
    """What ``tools/run_study.py`` does; returns the exit code."""
    parser = argparse.ArgumentParser(description="Runs a list of trainings and compares them.")
    parser.add_argument("study", help="a study file, by path or by name in configs/studies")
    parser.add_argument("--output", help="another output folder than the file's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument(
        "--write-expected", metavar="FILE", help="record the APs as ranges for later studies"
    )
    add_import_option(parser)
    args = parser.parse_args(argv)
    try:
        for name in args.imports:
            import_user_code(name)
        study = load_study(args.study, args.output)
        for warning in {run.warning for run in study.runs if run.warning and not run.finished}:
            print(f"warning: {warning} (opts: of the study file)", file=sys.stderr)
        failed = run_study(study, args.jobs, args.imports)
        report(study)
        if args.write_expected:
            write_expected(args.write_expected, study.finished_runs())
        outside = outside_expected(study.expected, study.finished_runs()) if study.expected else []
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_EXIT_CODE
    except OSError as error:  # A full disk, most of all.
        print(f"error: {error}; the same command continues from here", file=sys.stderr)
        return FAILED_EXIT_CODE
    except KeyboardInterrupt:
        print("stopped; the same command continues from here", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    if failed:
        names = ", ".join(str(run.folder) for run in failed)
        print(f"{len(failed)} runs failed: {names}; the same command tries them again")
    for sentence in outside:
        print(f"not as expected: {sentence}")
    return FAILED_EXIT_CODE if failed or outside else 0


if __name__ == "__main__":
    sys.exit(main())
