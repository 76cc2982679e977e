"""Studies: read and checked, finished runs skipped, failed ones named, a report at the end."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny import NUM_CLASSES, tiny_cfg

from kd_detectron.config import config_dir, get_config
from kd_detectron.data.synthetic import SYNTHETIC_CLASSES, make_synthetic
from kd_detectron.distillers import DISTILLER_REGISTRY
from kd_detectron.errors import ConfigError
from kd_detectron.runs.files import read_metrics
from kd_detectron.runs.run import load_run
from kd_detectron.studies import study as studies

STUDIES = sorted(path.name for path in (config_dir() / "studies").glob("*.yaml"))


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_names_configs_and_keys_that_exist(name):
    study = studies.load_study(name)
    assert len({run.folder for run in study.runs}) == len(study.runs)
    for run in study.runs:
        cfg = get_config(run.config, run.opts)
        assert run.max_iter == cfg.SOLVER.MAX_ITER > 0


def test_first_seeds_of_all_runs_come_first(tmp_path):
    one, two = ({"name": n, "config": "demo/baseline.yaml", "seeds": [3, 4]} for n in "ab")
    file = tmp_path / "study.yaml"
    file.write_text(json.dumps({"output": "out", "runs": [one, two]}))
    folders = [str(run.folder) for run in studies.load_study(str(file)).runs]
    assert folders == ["out/a/seed3", "out/b/seed3", "out/a/seed4", "out/b/seed4"]


def test_part_of_a_study_is_the_same_runs_in_the_same_folders():
    whole = {str(run.folder): run for run in studies.load_study("bccd.yaml").runs}
    part = studies.load_study("quick.yaml").runs
    assert {run.name for run in part} >= {"teacher", "baseline", "ckd_reviewkd"}
    assert len(part) == len({run.name for run in part})
    assert all(run == whole[str(run.folder)] for run in part)


def test_part_of_a_study_beside_it_is_found_from_any_directory(tmp_path):
    (tmp_path / "whole.yaml").write_text(
        "output: out\nruns: [{name: a, config: demo/baseline.yaml, seeds: [1, 2]}]\n"
    )
    (tmp_path / "part.yaml").write_text("part_of: whole.yaml\nseeds: [2]\n")
    (run,) = studies.load_study(str(tmp_path / "part.yaml")).runs
    assert str(run.folder) == "out/a/seed2"


def test_part_with_its_own_output_is_the_same_runs_changed(tmp_path):
    file = tmp_path / "again.yaml"
    file.write_text(
        "part_of: bccd.yaml\noutput: again\nonly: [baseline, heads]\n"
        "opts: [KD.TEACHER.WEIGHTS, other.pth, KD.SCHEDULE.STOP_ITER, 5]\n"
    )
    again = studies.load_study(str(file))
    whole = {run.name: run for run in studies.load_study("bccd.yaml").runs}
    assert again.expected is None
    assert [str(run.folder) for run in again.runs[:2]] == [
        "again/baseline/seed1",
        "again/heads/seed1",
    ]
    assert {run.teacher_weights for run in again.runs} == {"", "other.pth"}
    assert {run.config for run in again.runs} == {whole[n].config for n in ("baseline", "heads")}
    heads = again.runs[1]
    assert get_config(heads.config, heads.opts).KD.SCHEDULE.STOP_ITER == 5  # the row's own is 1


def test_study_without_a_teacher_is_reported_with_the_one_its_students_have(tmp_path):
    def study(*teachers):
        runs = [
            {"name": f"{n}", "config": "demo/ckd_reviewkd.yaml", "opts": ["KD.TEACHER.WEIGHTS", w]}
            for n, w in enumerate(teachers)
        ]
        runs.append({"name": "alone", "config": "demo/baseline.yaml"})
        file = tmp_path / "study.yaml"
        file.write_text(json.dumps({"output": "out", "runs": runs}))
        return studies.load_study(str(file))

    weights = str(tmp_path / "big" / "model_final.pth")
    assert studies.teacher_of_others(study(weights)) is None  # no finished run
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "result.json").write_text('{"finished": true}')
    assert studies.teacher_of_others(study(weights, weights)) == tmp_path / "big"
    assert studies.teacher_of_others(study(weights, "other/model_final.pth")) is None
    assert studies.teacher_of_others(study()) is None


def test_run_that_only_inherits_waits_for_its_teacher_too(tmp_path):
    opts = ["KD.DISTILLERS", "[]", "KD.TEACHER.INHERIT", "['roi_heads']"]
    opts += ["KD.TEACHER.WEIGHTS", "{output}/teacher/model_final.pth"]
    entry = {"name": "a", "config": "demo/ckd_reviewkd.yaml", "opts": opts}
    (tmp_path / "study.yaml").write_text(json.dumps({"output": "out", "runs": [entry]}))
    (run,) = studies.load_study(str(tmp_path / "study.yaml")).runs
    assert run.teacher_weights == "out/teacher/model_final.pth"


def test_paper_ablations_stand_ready():
    runs = {run.name: run for run in studies.load_study("ckd_ablations.yaml").runs}
    ckd = {name: get_config(r.config, r.opts).KD.CKD for name, r in runs.items()}
    assert {ckd[f"triple_{t}"].TRIPLE for t in ("tss", "sts", "stt")} == {"tss", "sts", "stt"}
    assert {0.07, 0.5, 1.0, 4.0} <= {node.TEMPERATURE for node in ckd.values()}
    assert {0, 16, 64, 2048} <= {node.GROUP_SIZE for node in ckd.values()}


RUN = "{name: a, config: demo/baseline.yaml}"
RUN_B = "{name: b, config: demo/baseline.yaml}"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("runs: [{name: a, config: demo/teacher_r34.yaml, sedes: [1]}]", ["sedes", "seeds"]),
        ("runs: [{name: a, config: demo/teachr.yaml}]", ["teachr.yaml"]),
        ("rons: []", ["rons", "runs"]),
        (f"expected: none.json\nruns: [{RUN}]", ["expected", "none.json"]),
        ("part_of: demo.yaml\nonly: [techer]\nseeds: [1]", ["techer", "teacher"]),
        ("part_of: demo.yaml\nopts: [SEED, 7]", ["opts", "output", "demo.yaml"]),
        ("part_of: demo.yaml\nexpected: none.json", ["expected", "output", "demo.yaml"]),
        ("part_of: bccd_mv2.yaml\nseeds: [9]", ["seeds is [9]", "baseline", "[1, 2]"]),
        (f"runs: [{RUN}, {RUN_B}, {RUN}]", ["2 runs named 'a'"]),
        (f"runs: [{RUN_B}, {RUN[:-1]}, against: c}}]", ["run 'a'", "against is 'c'", "b"]),
        ("runs: []", ["no runs"]),
        ("", ["no runs"]),
        ("runs: 3", ["runs is 3", "a list"]),
        ("runs: [teacher]", ["run 1 is 'teacher'"]),
        ("runs: [{name: a}]", ["run 'a'", "no config"]),
        ("runs: [{config: demo/baseline.yaml}]", ["run 1", "no name"]),
        ("runs: [{name: a, config: demo/baseline.yaml, opts: [SEED]}]", ["pairs of KEY VALUE"]),
        ("runs: [{name: a, config: demo/baseline.yaml, seeds: 1}]", ["seeds is 1", "list"]),
        ("runs: [{name: a, config: demo/baseline.yaml, seeds: [1, 1]}]", ["different whole"]),
        (
            "runs: [{name: a, config: demo/baseline.yaml, opts: [MODEL.WEIGHTS, '{outptu}/x']}]",
            ["{outptu}", "{output}", "run 'a'"],
        ),
        (
            "runs: [{name: a, config: demo/baseline.yaml, opts: [SOLVER.BASE_RL, 1]}]",
            ["run 'a'", "SOLVER.BASE_LR"],
        ),
        (f"defaults: {{sedes: [1]}}\nruns: [{RUN}]", ["defaults", "sedes", "seeds"]),
    ],
)
def test_mistakes_in_a_study_are_named(tmp_path, content, words):
    file = tmp_path / "study.yaml"
    file.write_text(content if "part_of" in content else f"output: {tmp_path}\n{content}\n")
    with pytest.raises(ConfigError) as error:
        studies.load_study(str(file))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("jobs", ["0", "-1"])
def test_less_than_one_run_at_a_time_is_refused(tmp_path, capsys, jobs):
    (tmp_path / "study.yaml").write_text(f"output: {tmp_path / 'out'}\nruns: [{RUN}]\n")
    assert studies.main([str(tmp_path / "study.yaml"), "--jobs", jobs]) == 2
    assert f"--jobs is {jobs}; give at least 1" in capsys.readouterr().err


def test_runs_that_wait_for_each_other_are_named(tmp_path, capsys):
    runs = [
        {
            "name": name,
            "config": "demo/ckd_reviewkd.yaml",
            "opts": ["KD.TEACHER.WEIGHTS", f"{{output}}/{other}/model_final.pth"],
        }
        for name, other in ("ab", "ba")
    ]
    content = {"output": str(tmp_path / "out"), "runs": runs}
    (tmp_path / "study.yaml").write_text(json.dumps(content))
    assert studies.main([str(tmp_path / "study.yaml")]) == 2
    out = tmp_path / "out"
    assert f"the runs {out / 'a'}, {out / 'b'} wait for each other" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "output: [\n", "text", "part_of: study.yaml"])
def test_file_that_is_no_study_is_one_sentence(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"^study 'study\.yaml'"):
        studies.load_study("study.yaml")


def test_defaults_hold_where_a_run_says_nothing_else(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(
        "output: out\n"
        "defaults: {config: demo/baseline.yaml, seeds: [1, 2], opts: [SOLVER.MAX_ITER, 7]}\n"
        "runs:\n"
        "  - {name: teacher, config: demo/teacher_r34.yaml, seeds: null}\n"
        "  - {name: a}\n"
        "  - {name: b, seeds: [3], opts: [SOLVER.MAX_ITER, 9]}\n"
    )
    runs = {str(run.folder): run for run in studies.load_study(str(file)).runs}
    assert sorted(runs) == ["out/a/seed1", "out/a/seed2", "out/b/seed3", "out/teacher"]
    assert [runs[f"out/{n}"].max_iter for n in ("teacher", "a/seed1", "b/seed3")] == [7, 7, 9]
    assert runs["out/teacher"].config == "demo/teacher_r34.yaml"
    assert runs["out/a/seed2"].config == "demo/baseline.yaml"


def write_finished_run(run, opts=(), **result):
    """The folder of a finished run, as a training with these options leaves it."""
    cfg = get_config(run.config, [*run.opts, *opts])
    cfg.OUTPUT_DIR = str(run.folder)
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(cfg.dump())
    record = {"finished": True, "iterations": run.max_iter, "results": {"bbox": {"AP": 30.0}}}
    (run.folder / "result.json").write_text(json.dumps(record | result))


def test_full_disk_is_said_in_one_sentence(tmp_path, monkeypatch, capsys):
    def write_picture(*args):
        with open("/dev/full", "w") as file:
            file.write("a picture")

    file = tmp_path / "study.yaml"
    run = {"name": "a", "config": "demo/baseline.yaml"}
    file.write_text(json.dumps({"output": str(tmp_path / "out"), "runs": [run]}))
    monkeypatch.setattr(studies, "run_study", lambda *args: [])
    monkeypatch.setattr(studies, "report", write_picture)
    assert studies.main([str(file)]) == 1
    error = "error: [Errno 28] No space left on device; the same command continues from here\n"
    assert capsys.readouterr().err.endswith(error)


def test_run_whose_options_changed_in_the_file_is_refused(tmp_path):
    def study(learning_rate, output="out"):
        file = tmp_path / "study.yaml"
        entry = {"name": "a", "config": "demo/ckd_reviewkd.yaml", "seeds": [1]}
        entry["opts"] = ["SOLVER.BASE_LR", learning_rate, "KD.TEACHER.WEIGHTS", "{output}/t.pth"]
        file.write_text(json.dumps({"output": str(tmp_path / output), "runs": [entry]}))
        return studies.load_study(str(file))

    (run,) = study(0.5).runs
    # The device, the periods and the options of distillers that are not in use may differ.
    free = ["MODEL.DEVICE", "cpu", "TEST.EVAL_PERIOD", 3, "KD.DKD.BETA", 7.0]
    write_finished_run(run, [*free, "SOLVER.CHECKPOINT_MAX_TO_KEEP", 1])
    assert study(0.5).runs[0].finished
    (tmp_path / "out").rename(tmp_path / "moved")
    assert study(0.5, "moved").runs[0].finished
    refusal = r"SOLVER\.BASE_LR 0\.5 \(the file: 0\.25\).*remove"
    with pytest.raises(ConfigError, match=refusal) as e:
        study(0.25, "moved")
    assert "KD.TEACHER" not in str(e.value)
    # An interrupted run is not continued with other options either; one without a checkpoint, or
    # whose config was cut off, has nothing to compare.
    folder = tmp_path / "moved" / "a" / "seed1"
    (folder / "result.json").unlink()
    study(0.25, "moved")
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    with pytest.raises(ConfigError, match=refusal):
        study(0.25, "moved")
    (folder / "config.yaml").write_text("SOLVER: {BASE_")
    study(0.25, "moved")


def test_extended_run_is_not_finished_until_its_new_end(tmp_path):
    file = tmp_path / "study.yaml"
    run = {"name": "a", "config": "demo/baseline.yaml"}
    file.write_text(json.dumps({"output": str(tmp_path / "out"), "runs": [run]}))
    (run,) = studies.load_study(str(file)).runs
    write_finished_run(run)
    metrics = [{"iteration": i, "bbox/AP": 20.0} for i in (run.max_iter - 1, run.max_iter)]
    text = "".join(json.dumps(record) + "\n" for record in metrics)
    (run.folder / "metrics.json").write_text(text)
    assert run.finished and load_run(run.folder).results == {"bbox": {"AP": 30.0}}
    extended = json.dumps({"iteration": run.max_iter + 10, "bbox/AP": 31.0})
    (run.folder / "metrics.json").write_text(text + extended + "\n")
    assert not run.finished and load_run(run.folder).results == {"bbox": {"AP": 31.0}}
    assert studies.load_study(str(file)).finished_runs() == {}


@pytest.fixture
def study_file(tmp_path, monkeypatch):
    """Two tiny runs on six synthetic images and one that cannot work."""
    make_synthetic(tmp_path / "data", 6, 2, image_size=(64, 64))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    # Detectron2's catalog outlives a test.
    tag = tmp_path.name
    cfg = tiny_cfg(
        [
            *("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
            *("MODEL.ROI_HEADS.NUM_CLASSES", len(SYNTHETIC_CLASSES)),
            *("DATASETS.COCO_FORMAT", [[f"{s}_{tag}", f"{s}.json", s] for s in ("train", "val")]),
            *("DATASETS.TRAIN", (f"train_{tag}",)),
            *("DATASETS.TEST", (f"val_{tag}",)),
            *("SOLVER.MAX_ITER", 2),
            *("SOLVER.STEPS", ()),
        ]
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(cfg.dump())
    file = tmp_path / "study.yaml"
    file.write_text(
        f"output: {tmp_path / 'out'}\n"
        f"runs:\n"
        f"  - {{name: good, config: {tmp_path / 'run.yaml'}, seeds: [1, 2]}}\n"
        f"  - name: bad\n"
        f"    config: {tmp_path / 'run.yaml'}\n"
        f"    opts: [MODEL.ROI_HEADS.NUM_CLASSES, {NUM_CLASSES}]\n"
    )
    return file


def test_finished_runs_are_skipped_failed_ones_named_and_a_table_ends_it(
    tmp_path, study_file, capsys
):
    assert studies.main([str(study_file)]) == 1
    printed = capsys.readouterr().out
    assert "FAILED with exit code 2" in printed and "NUM_CLASSES" in printed
    assert "1 runs failed" in printed and "good (n=2)" in printed
    out = tmp_path / "out"
    written = {path.name for path in out.iterdir() if path.is_file()}
    assert written >= {"results.md", "results.csv", "ap.png", "curves.png", "predictions.png"}
    before = os.path.getmtime(out / "good" / "seed1" / "model_final.pth")
    assert studies.main([str(study_file)]) == 1
    assert os.path.getmtime(out / "good" / "seed1" / "model_final.pth") == before

    good_runs = study_file.read_text().split("  - name: bad")[0]
    study_file.write_text(good_runs)
    ranges = tmp_path / "ranges.json"
    assert studies.main([str(study_file), "--write-expected", str(ranges)]) == 0
    study_file.write_text(f"expected: ranges.json\n{good_runs}")
    assert studies.main([str(study_file)]) == 0
    wrong = json.loads(ranges.read_text())
    wrong["good"]["bbox"] |= {"low": 90.0, "high": 95.0}
    ranges.write_text(json.dumps(wrong))
    capsys.readouterr()
    assert studies.main([str(study_file)]) == 1
    printed = capsys.readouterr().out
    assert "good/seed1: box AP is" in printed and "expected 90.0 to 95.0" in printed


def test_study_whose_trainings_are_slow_in_bfloat16_warns_once(study_file, monkeypatch, capsys):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(studies, "run_study", lambda *args: [])
    content = study_file.read_text()
    study_file.write_text(content + "opts: [SOLVER.AMP.ENABLED, True, SOLVER.AMP.PRECISION, bf16]")
    assert studies.main([str(study_file)]) == 0
    printed = capsys.readouterr().err
    assert printed.count("warning: ") == printed.count("set SOLVER.AMP.ENABLED False") == 1


def heed_interrupts():
    # A shell that runs the tests in the background makes all its children ignore SIGINT.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_interrupted_study_goes_on_where_it_stopped(tmp_path, study_file):
    text = (tmp_path / "run.yaml").read_text()
    (tmp_path / "run.yaml").write_text(text.replace("MAX_ITER: 2", "MAX_ITER: 80"))
    command = [sys.executable, "-m", "kd_detectron.studies.study", str(study_file)]
    stopped = tmp_path / "out" / "good" / "seed1"

    def steps():
        return len(read_metrics(stopped))

    def interrupt(send):
        process = subprocess.Popen(command, start_new_session=True, preexec_fn=heed_interrupts)
        deadline, before = time.monotonic() + 300, steps()
        while steps() <= before:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.2)
        send(process)
        assert process.wait(timeout=60) == 75
        assert (stopped / "last_checkpoint").is_file() and not (stopped / "result.json").is_file()

    # Ctrl-C reaches every process of the terminal, a cluster's SIGTERM the study alone.
    interrupt(lambda process: os.killpg(process.pid, signal.SIGINT))
    interrupt(lambda process: process.terminate())

    (tmp_path / "study.yaml").write_text(
        study_file.read_text().split("  - name: bad")[0].replace("[1, 2]", "[1]")
    )
    assert studies.main([str(study_file)]) == 0
    assert json.loads((stopped / "result.json").read_text())["iterations"] == 80
    log = (stopped / "console.log").read_text()
    starts = [int(s.split()[0]) for s in log.split("Starting training from iteration ")[1:]]
    assert len(starts) == 3 and 0 == starts[0] < starts[1] < starts[2]


@pytest.mark.slow
def test_runs_go_side_by_side_and_students_wait_for_their_teacher(tmp_path, study_file, capsys):
    text = study_file.read_text().split("  - name: bad")[0].replace("[1, 2]", "[1]")
    study_file.write_text(
        f"{text}"
        f"  - name: early\n"
        f"    config: {tmp_path / 'run.yaml'}\n"
        f"    opts: &student\n"
        f"      [MODEL.META_ARCHITECTURE, DistilledRCNN, KD.DISTILLERS, \"['KD']\",\n"
        f"       KD.TEACHER.CONFIG_FILE, {tmp_path / 'run.yaml'},\n"
        f"       KD.TEACHER.WEIGHTS, '{{output}}/teacher/model_final.pth']\n"
        f"  - {{name: teacher, config: {tmp_path / 'run.yaml'}}}\n"
    )
    assert studies.main([str(study_file), "--jobs", "2"]) == 0
    started = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert [line.split("/out/")[1].split(",")[0] for line in started] == [
        "good/seed1",
        "teacher",
        "early",
    ]
    assert len(list((tmp_path / "out").rglob("result.json"))) == 3


def test_own_distiller_is_imported_to_read_the_study_and_in_each_run(tmp_path, monkeypatch):
    monkeypatch.setattr(DISTILLER_REGISTRY, "_obj_map", dict(DISTILLER_REGISTRY._obj_map))
    code = tmp_path / "a_distiller_of_a_study.py"
    code.write_text(
        "from kd_detectron.distillers import DISTILLER_REGISTRY, Distiller\n"
        "@DISTILLER_REGISTRY.register()\n"
        "class OfAStudy(Distiller):\n"
        "    def __init__(self, *, factor: float = 1.0):\n"
        "        super().__init__()\n"
    )
    file = tmp_path / "study.yaml"
    opts = ["KD.DISTILLERS", "['OfAStudy']", "KD.OFASTUDY.FACTOR", 2.0]
    run = {"name": "a", "config": "demo/ckd_reviewkd.yaml", "opts": opts}
    file.write_text(json.dumps({"output": str(tmp_path / "out"), "runs": [run]}))
    assert studies.main([str(file)]) == 2  # there is no node KD.OFASTUDY
    started = []

    class Process:
        def __init__(self, command, **options):
            started.append(command)

        def poll(self):
            return 1

    monkeypatch.setattr(studies.subprocess, "Popen", Process)
    assert studies.main([str(file), "--import", str(code)]) == 1
    (command,) = started
    assert command[command.index("--import") + 1] == str(code)
    # Options go before KEY VALUE overrides.
    assert command.index("--import") < command.index("KD.DISTILLERS")
