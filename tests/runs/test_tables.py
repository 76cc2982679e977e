import csv
import importlib.util
import io
import json
from pathlib import Path

import pytest
import yaml

from kd_detectron.errors import ConfigError
from kd_detectron.runs.groups import experiment
from kd_detectron.runs.paired import Estimate
from kd_detectron.runs.run import load_run
from kd_detectron.runs.tables import build_table, load_teacher

PUBLISHED = {
    "source": "some paper",
    "table_iv": {
        "metrics": ["AP", "AP50", "AP75"],
        "pairs": {
            "R101-R18": {
                "Teacher": [42.0, 62.0, 45.0],
                "Student": [33.0, 53.0, 35.0],
                "CKD": [35.0, 55.0, 38.0],
            }
        },
    },
    "table_v": {
        "metrics": ["AP"],
        "pairs": {"R101-R18": {"Student": [31.0], "CKD": [34.0]}},
    },
}


def gain(row):
    """The row's gains and shares of the gap, by column."""
    return {
        k: v for k, v in row.values.items() if k.endswith(("gain", "closed")) and "paper" not in k
    }


def paper(row):
    """The row's published numbers, by column."""
    found = {k.removeprefix("paper "): v.mean for k, v in row.values.items() if "paper" in k}
    return found


def read_csv(table):
    return list(csv.DictReader(io.StringIO(table.csv())))


@pytest.fixture
def teacher_file(tmp_path):
    path = tmp_path / "teacher.json"
    path.write_text(json.dumps({"AP": 40.0}))
    return path


def test_gain_and_share_of_the_gap(write_run, teacher_file):
    baseline = load_run(write_run("baseline", ap=[30.0, 50.0]))
    ckd = load_run(write_run("ckd", distillers=["CKD"], ap=[34.0, 56.0]))
    table = build_table([ckd, baseline], teachers=[load_teacher(teacher_file)])
    assert [row.method for row in table.rows] == ["teacher", "baseline", "CKD"]
    row = table.rows[2]
    assert gain(row) == {"box gain": Estimate(4.0), "box gap closed": Estimate(40.0)}
    assert gain(table.rows[1]) == {}
    assert table.notes == []


def test_seeds_of_one_experiment_share_a_row(write_run):
    runs = [
        load_run(write_run(f"s{seed}", distillers=["CKD"], ap=[ap], seed=seed, seconds=60 * seed))
        for seed, ap in ((1, 34.0), (2, 35.0), (3, 36.0))
    ]
    baseline = load_run(write_run("baseline", ap=[30.0]))
    table = build_table([*runs, baseline])
    row = table.rows[1]
    assert (row.runs, row.values["box AP"]) == (3, Estimate(35.0, 1.0))
    assert gain(row) == {"box gain": Estimate(5.0)}
    assert row.values["training seconds"].mean == 120.0
    assert "CKD (n=3)" in table.text() and "35.00 ± 1.00" in table.text()
    assert "0:02:00" in table.text()


def test_runs_that_differ_in_an_option_stay_apart_and_say_in_which(write_run):
    plain = load_run(write_run("a", distillers=["CKD"], ap=[34.0]))
    other = load_run(write_run("b", distillers=["CKD"], ap=[36.0], opts=["KD.CKD.TRIPLE", "sts"]))
    # An option of a distiller that is not in use makes no difference.
    same = load_run(write_run("c", distillers=["CKD"], ap=[35.0], opts=["KD.DKD.BETA", 9.0]))
    table = build_table([plain, other, same])
    assert [(row.method, row.runs) for row in table.rows] == [
        ("CKD (CKD.TRIPLE tss)", 2),
        ("CKD (CKD.TRIPLE sts)", 1),
    ]


def load_without(folder, *keys):
    """The run of a folder, whose config is from a version that did not have these keys."""
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    for key in keys:
        *nodes, name = key.split(".")
        node = config
        for part in nodes:
            node = node.get(part, {})
        node.pop(name, None)
    path.write_text(yaml.safe_dump(config))
    return load_run(folder)


@pytest.mark.parametrize(
    ("key", "default", "other"),
    [
        ("KD.MASKKD.FORM", "cross_entropy", "relative"),
        ("KD.TEACHER.INHERIT_LR_FACTOR", 1.0, 0.1),
        ("SOLVER.EMA.ENABLED", False, True),
    ],
)
def test_key_that_an_older_run_does_not_have_counts_as_its_default(write_run, key, default, other):
    taught = {"distillers": ["MaskKD"], "ap": [30.0]}
    old = load_without(write_run("old", **taught), key)
    new = load_run(write_run("new", **taught, seed=1, opts=[key, default]))
    changed = load_run(write_run("changed", **taught, opts=[key, other]))
    for runs in ([old, new, changed], [changed, new, old]):
        assert sorted(row.runs for row in build_table(runs).rows) == [1, 2]
    assert len(build_table([old, changed]).rows) == 2


def test_run_of_a_distiller_that_is_not_known_is_shown(write_run):
    runs = [load_run(write_run(f"own {x}", distillers=["Own"], ap=[30.0], seed=x)) for x in (1, 2)]
    (row,) = build_table(runs).rows
    assert (row.method, row.runs) == ("Own", 2)


def test_class_names_that_newer_torchvision_runs_hold_set_no_runs_apart(write_run):
    config = load_run(write_run("run")).config

    def with_data(data):
        return experiment({**config, "DATASETS": data})

    older = with_data({"TRAIN": ["train.json"]})
    assert with_data({"TRAIN": ["train.json"], "TRAIN_CLASSES": ["disc", "star"]}) == older
    assert with_data({"TRAIN": ["other.json"]}) != older


@pytest.mark.parametrize("key", ["SOLVER.CHECKPOINT_MAX_TO_KEEP", "DATALOADER.MAX_CORRUPT_IMAGES"])
def test_how_files_are_kept_and_read_is_no_part_of_an_experiment(write_run, key):
    one = load_without(write_run("one", ap=[30.0]), key)
    two = load_run(write_run("two", ap=[30.0], seed=1, opts=[key, 2]))
    ckd = load_run(write_run("ckd", distillers=["CKD"], ap=[34.0], opts=[key, 3]))
    table = build_table([one, two, ckd])
    assert [(row.method, row.runs) for row in table.rows] == [("baseline", 2), ("CKD", 1)]
    assert not any("differ" in note and key in note for note in table.notes)


def test_long_config_values_do_not_stretch_the_table(write_run):
    data = [["x" * 100, "a.json", "a"]]
    runs = [
        load_run(write_run("a", ap=[30.0])),
        load_run(write_run("b", ap=[30.0], opts=["DATASETS.COCO_FORMAT", data])),
    ]
    labels = [row.method for row in build_table(runs).rows]
    assert labels[0] == "baseline (DATASETS.COCO_FORMAT [])"
    assert labels[1] == f"baseline (DATASETS.COCO_FORMAT [['{'x' * 24}...)"


def test_missing_values_are_never_zero(write_run):
    ckd = load_run(write_run("ckd", distillers=["CKD"], ap=[34.0], seconds=None))
    table = build_table([ckd])
    (row,) = read_csv(table)
    assert (row["box AP"], row["box AP50"], row["box gain"]) == ("34.0", "", "")
    assert (row["box gap closed"], row["training seconds"]) == ("", "")
    (line,) = (line for line in table.text().splitlines() if line.startswith("CKD"))
    cells = line.split()
    assert cells == ["CKD", "R101-R18", "34.00", *["-"] * 8]
    assert table.notes == [
        "No baseline run for Faster R-CNN with student R18 on coco_2017_val: no gain is shown."
    ]


def test_gain_is_measured_against_the_same_student_only(write_run):
    r18 = load_run(write_run("r18", ap=[30.0]))
    r50 = load_run(write_run("r50", ap=[36.0], depth=50))
    ckd18 = load_run(write_run("ckd18", distillers=["CKD"], ap=[34.0]))
    ckd50 = load_run(write_run("ckd50", distillers=["CKD"], ap=[39.0], depth=50))
    table = build_table([r18, r50, ckd18, ckd50])
    assert [(row.method, row.pair, gain(row)) for row in table.rows] == [
        ("baseline", "R18", {}),
        ("CKD", "R101-R18", {"box gain": Estimate(4.0)}),
        ("baseline", "R50", {}),
        ("CKD", "R101-R50", {"box gain": Estimate(3.0)}),
    ]


def test_several_baselines_and_differences_from_the_baseline_are_noted(write_run):
    short = load_run(write_run("short", ap=[20.0], iterations=10))
    long = load_run(write_run("long", ap=[30.0], opts=["SOLVER.MAX_ITER", 100]))
    ckd = load_run(write_run("ckd", distillers=["CKD"], ap=[34.0], opts=["SOLVER.MAX_ITER", 100]))
    ambiguous = build_table([short, long, ckd])
    assert gain(ambiguous.rows[-1]) == {}
    assert "leave out all but one" in ambiguous.notes[0]
    assert gain(build_table([long, ckd]).rows[-1]) == {"box gain": Estimate(4.0)}
    unfair = build_table([short, ckd])
    assert gain(unfair.rows[-1]) == {"box gain": Estimate(14.0)}
    assert "SOLVER.MAX_ITER (100, baseline 40000)" in unfair.notes[0]
    assert "iterations trained (100, baseline 10)" in unfair.notes[0]


def test_published_numbers_stand_beside_the_rows_they_belong_to(write_run, tmp_path):
    teacher = tmp_path / "teacher.json"
    teacher.write_text(json.dumps({"name": "R101", "bbox": {"AP": 41.0}}))
    runs = [
        load_run(write_run("baseline", ap=[30.0])),
        load_run(write_run("ckd", distillers=["CKD"], ap=[34.0])),
        load_run(write_run("dkd", distillers=["DKD"], ap=[33.0])),
        load_run(write_run("mask", distillers=["CKD"], ap=[35.0], mask_ap=[33.0])),
        load_run(write_run("own", distillers=["CKD"], ap=[1.0], opts=["DATASETS.TEST", ("my",)])),
    ]
    table = build_table(runs, teachers=[load_teacher(teacher)], published=PUBLISHED)
    papers = {(row.method, row.detector): paper(row) for row in table.rows}
    box = {"box AP": 35.0, "box AP50": 55.0, "box AP75": 38.0, "box gain": 2.0}
    assert papers["teacher", "Faster R-CNN"]["box AP"] == 42.0
    assert papers["baseline", "Faster R-CNN"]["box AP"] == 33.0
    assert papers["CKD (DATASETS.TEST ['coco_2017_val'])", "Faster R-CNN"] == box
    assert papers["CKD (DATASETS.TEST ['my'])", "Faster R-CNN"] == {}
    assert papers["DKD", "Faster R-CNN"] == {}
    assert papers["CKD", "Mask R-CNN"] == {"mask AP": 34.0, "mask gain": 3.0}
    assert table.notes[-1] == "paper: some paper."
    assert "### Faster R-CNN\n" in table.markdown() and "### Mask R-CNN\n" in table.markdown()


def test_unfinished_run_is_labelled_and_not_averaged(write_run):
    done = load_run(write_run("a", distillers=["CKD"], ap=[34.0]))
    metrics = [{"iteration": 49, "bbox/AP": 10.0}]
    stopped = load_run(write_run("b", distillers=["CKD"], seed=1, result=False, metrics=metrics))
    table = build_table([done, stopped])
    assert [row.method for row in table.rows] == ["CKD", "CKD (unfinished, 50 iterations)"]


def test_teacher_without_gap_closes_nothing(write_run, tmp_path):
    teacher = tmp_path / "teacher.json"
    teacher.write_text('{"AP": 29.0}')
    runs = [
        load_run(write_run("baseline", ap=[30.0])),
        load_run(write_run("ckd", distillers=["CKD"], ap=[34.0])),
    ]
    table = build_table(runs, teachers=[load_teacher(teacher)])
    assert gain(table.rows[-1]) == {"box gain": Estimate(4.0)}
    assert "there is no gap to close" in table.notes[0]


def test_teacher_can_be_a_run_folder(write_run):
    teacher = load_teacher(write_run("teacher", depth=101, ap=[40.0], seconds=7200.0))
    runs = [
        load_run(write_run("baseline", ap=[30.0])),
        load_run(write_run("ckd", distillers=["CKD"], ap=[34.0])),
    ]
    table = build_table(runs, teachers=[teacher])
    assert table.rows[0].pair == "R101" and table.rows[0].values["training seconds"].mean == 7200
    assert table.rows[-1].values["box gap closed"] == Estimate(40.0)


def test_teacher_that_detected_nothing_is_said_to_have_no_ap(write_run):
    ckd = load_run(write_run("ckd", distillers=["CKD"], ap=[34.0]))
    baseline = load_run(write_run("baseline", ap=[30.0]))
    teacher = write_run("teacher", depth=101, ap=[None])
    table = build_table([baseline, ckd], teachers=[load_teacher(teacher)])
    assert "teacher has no AP: it was not evaluated, or" in table.notes[0]
    assert list(table.rows[0].values) == ["training seconds"]
    assert gain(table.rows[-1]) == {"box gain": Estimate(4.0)} and table.text()


def test_box_ap_of_a_teacher_file_is_no_mask_rcnn_in_a_mixed_table(write_run, teacher_file):
    runs = [
        load_run(write_run("baseline", ap=[30.0])),
        load_run(write_run("ckd", distillers=["CKD"], ap=[34.0])),
        load_run(write_run("mask_baseline", ap=[30.0], mask_ap=[28.0])),
        load_run(write_run("mask_ckd", distillers=["CKD"], ap=[34.0], mask_ap=[32.0])),
    ]
    table = build_table(runs, teachers=[load_teacher(teacher_file)])
    gains = {(row.detector, row.method): gain(row) for row in table.rows}
    assert gains["Faster R-CNN", "CKD"]["box gap closed"] == Estimate(40.0)
    assert gains["Mask R-CNN", "CKD"] == {"box gain": Estimate(4.0), "mask gain": Estimate(4.0)}


@pytest.mark.parametrize("text", ["{}", "[1]", '{"bbox": 3}', '{"AP": '])
def test_teacher_file_without_ap_is_refused(tmp_path, text):
    path = tmp_path / "teacher.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"teacher\.json"):
        load_teacher(path)


@pytest.mark.parametrize(
    "text",
    ['{"AP": "high"}', "3", '{"bbox": {"AP": null}}', '{"bbox": [1]}'],
)
def test_teacher_file_with_odd_values_is_refused(tmp_path, text):
    (tmp_path / "teacher.json").write_text(text)
    with pytest.raises(ConfigError, match=r'holds no "AP"'):
        load_teacher(tmp_path / "teacher.json")


def test_gain_is_paired_by_seed_and_has_its_interval(write_run, teacher_file):
    def seeds(name, aps, **options):
        return [
            load_run(write_run(f"{name}{seed}", ap=[ap], seed=seed, **options))
            for seed, ap in aps.items()
        ]

    baseline = seeds("base", {1: 20.0, 2: 30.0, 3: 34.0})
    # By seed +1, +2 and +3: mean 2, standard deviation 1, however far apart the seeds are.
    ckd = seeds("ckd", {1: 21.0, 2: 32.0, 3: 37.0}, distillers=["CKD"])
    teachers = [load_teacher(teacher_file)]
    table = build_table([*baseline, *ckd], teachers=teachers)
    found, share = (table.rows[-1].values[f"box {what}"] for what in ("gain", "gap closed"))
    half = 4.30265 / 3**0.5
    assert found.mean == 2.0
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))
    assert share.mean == pytest.approx(100 * 2 / 12)
    assert "+2.00 (-0.48 to +4.48)" in table.text() and "17% (" in table.markdown()
    row = read_csv(table)[-1]
    assert (row["box gain"], row["box gain low"]) == ("2.0", f"{2 - half:.4f}")
    assert float(row["box gap closed low"]) == pytest.approx(share.low, abs=1e-4)
    assert any("95 % confidence interval" in note for note in table.notes)

    # Seeds that one of the two lacks are left out of the gain, and the table says so.
    fewer = build_table([*baseline[:2], *ckd], teachers=teachers)
    assert fewer.rows[-1].values["box gain"].mean == 1.5
    assert any("over the 2 seeds" in note for note in fewer.notes)
    # With one seed in common it is that seed's.
    alone = build_table([baseline[0], *ckd])
    assert gain(alone.rows[-1]) == {"box gain": Estimate(1.0)}
    assert any("over the 1 seed that" in note for note in alone.notes)
    # Nothing to pair.
    other = build_table([*baseline[1:], ckd[0]])
    assert gain(other.rows[-1]) == {"box gain": Estimate(-11.0)}
    assert any("share no seed" in note for note in other.notes)


def test_other_test_datasets_are_shown_when_asked(write_run):
    opts = ["DATASETS.TEST", ("coco_2017_val", "mine")]
    metrics = [{"iteration": 9, "coco_2017_val/bbox/AP": 10.0, "mine/bbox/AP": 20.0}]
    for folder, result in (("ended", True), ("stopped", False)):
        path = write_run(folder, opts=opts, metrics=metrics, result=result)
        if result:
            record = json.loads((path / "result.json").read_text())
            record["results"] = {
                "coco_2017_val": {"bbox": {"AP": 10.0}},
                "mine": {"bbox": {"AP": 20.0}},
            }
            (path / "result.json").write_text(json.dumps(record))
        run = load_run(path)
        assert (run.results, run.test_dataset) == ({"bbox": {"AP": 10.0}}, "coco_2017_val")
        assert run.series("bbox/AP") == ([9], [10.0])
        other = load_run(path, "mine")
        assert (other.results, other.test_dataset) == ({"bbox": {"AP": 20.0}}, "mine")
        assert other.series("bbox/AP") == ([9], [20.0])
        with pytest.raises(ConfigError, match=r"not evaluated on 'yours'.*'mine'"):
            load_run(path, "yours")


def test_keys_that_the_backbone_does_not_read_are_no_difference(write_run):
    mobile = ["MODEL.BACKBONE.NAME", "build_mobilenetv2_fpn_backbone"]
    baseline = load_run(write_run("a", ap=[30.0], opts=mobile))
    ckd = load_run(
        write_run("b", ap=[31.0], distillers=["CKD"], opts=[*mobile, "MODEL.RESNETS.DEPTH", 101])
    )
    assert build_table([baseline, ckd]).notes == []
    frozen = [*mobile, "MODEL.RESNETS.NORM", "BN"]
    other = load_run(write_run("c", ap=[31.0], distillers=["CKD"], opts=frozen))
    assert "RESNETS.NORM" in build_table([baseline, other]).notes[0]


def test_teacher_of_the_runs_is_named_so_and_is_no_baseline(write_run):
    teacher = write_run("teacher", depth=18, ap=[40.0])
    weights = ["KD.TEACHER.WEIGHTS", str(teacher / "model_final.pth")]
    ckd = write_run("ckd", distillers=["CKD"], ap=[34.0], opts=weights)
    base = write_run("base", ap=[30.0], opts=["SOLVER.BASE_LR", 1.0])
    runs = [load_run(folder) for folder in (teacher, base, ckd)]
    table = build_table(runs)
    assert [row.method.split(" ")[0] for row in table.rows] == ["teacher", "baseline", "CKD"]
    assert gain(table.rows[-1]) == {"box gain": Estimate(4.0)}


def load_tool(name):
    path = Path(__file__).parents[2] / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_command_prints_and_writes_the_table(write_run, teacher_file, tmp_path, capsys):
    baseline, ckd = write_run("baseline", ap=[30.0]), write_run("c", distillers=["CKD"], ap=[34.0])
    files = ["--csv", str(tmp_path / "t.csv"), "--markdown", str(tmp_path / "t.md")]
    arguments = [str(ckd), str(baseline), "--teacher", str(teacher_file), *files]
    assert load_tool("results_table").main(arguments) == 0
    printed = capsys.readouterr().out
    assert "+4.00" in printed and "40%" in printed and "35.08" in printed
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert [row["method"] for row in rows] == ["teacher", "baseline", "CKD"]
    assert (rows[2]["box gain"], rows[2]["paper box AP"]) == ("4.0", "35.08")
    assert (tmp_path / "t.md").read_text().splitlines()[2].startswith("| method")


def test_command_reports_a_user_error_without_traceback(tmp_path, capsys):
    assert load_tool("results_table").main([str(tmp_path)]) == 2
    assert "error:" in capsys.readouterr().err
