"""The benchmark's report: which parts it has, how often each ran, and that it survives JSON.

Times are never compared: only what they are times of.
"""

import json
from collections import Counter

import pytest
import torch
from tiny import distilled_cfg
from torch.utils._pytree import tree_leaves

from kd_detectron.errors import ConfigError
from kd_detectron.profiling import benchmark
from kd_detectron.profiling import report as report_file

SMALL = {"images": 1, "size": (64, 96), "repeats": 2}


def small_report(tmp_path, distillers, opts=None, **options):
    cfg = distilled_cfg(tmp_path, distillers, opts)
    return benchmark.run_benchmark(cfg, name="tiny", **SMALL, **options)


@pytest.mark.parametrize(
    ("distillers", "teacher"),
    [
        (["ReviewKD"], ["teacher backbone"]),
        (["DCD"], ["teacher backbone", "teacher box head"]),
        (["CKD", "FGFI"], ["teacher backbone", "teacher box head", "teacher predictor"]),
    ],
)
def test_parts_are_what_the_distilled_step_runs(tmp_path, distillers, teacher):
    report = small_report(tmp_path, distillers)
    assert list(report["parts"]) == ["student step", *teacher, *distillers, "distilled step"]
    for part in report["parts"].values():
        assert len(part["seconds"]) == SMALL["repeats"]
        assert 0 < part["low"] <= part["median"] <= part["high"]
    assert report["batch"] == {"images": 1, "height": 64, "width": 96, "proposals": 16}
    assert {"device", "cores", "threads", "torch", "detectron2"} <= set(report["machine"])


def test_masks_and_autocast_are_measured_too(tmp_path):
    opts = ["MODEL.MASK_ON", True, "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bf16"]
    report = small_report(tmp_path, ["CKD", "ReviewKD"], opts)
    assert report["amp"] == "bf16"


def test_every_round_runs_every_part_once_after_one_of_warm_up():
    calls = Counter()

    parts = {name: lambda name=name: calls.update([name]) for name in "ab"}
    seconds = benchmark.time_parts(parts, repeats=4, device="cpu")
    assert calls == {"a": 5, "b": 5}
    assert [len(values) for values in seconds.values()] == [4, 4]


def test_overhead_is_against_student_teacher_and_distillers_of_the_same_round():
    seconds = {
        "student step": [2.0, 4.0, 2.0],
        "teacher backbone": [1.0, 2.0, 1.0],
        "CKD": [1.0, 2.0, 1.0],
        "distilled step": [6.0, 12.0, 6.0],
    }
    ratios = benchmark.ratios(seconds)
    assert ratios["overhead"] == {"median": 1.5, "low": 1.5, "high": 1.5}
    assert ratios["to_plain"]["median"] == 3.0


def test_distiller_alone_differentiates_no_further_than_the_recorded_tensors(tmp_path):
    cfg = distilled_cfg(tmp_path, ["CKD", "ReviewKD"])
    step = benchmark.Step(
        cfg, benchmark.synthetic_batch(cfg, images=1, size=(64, 96)), distilled=True
    )
    context = benchmark.record_context(step)
    student = [x for x in tree_leaves(vars(context.student)) if x is not None]
    assert len(student) == 8 and all(t.is_leaf and t.requires_grad for t in student)
    assert not any(t.requires_grad for t in tree_leaves(context.teacher.features))
    assert all(not d._forward_pre_hooks for d in step.model.distillers.values())
    step.model.zero_grad()
    reached = set()
    for distiller in step.model.distillers.values():
        alone = benchmark.distiller_alone(distiller, context, benchmark.autocast_options(cfg))
        # The gradients of the recorded tensors come first.
        reached |= {i for i, g in enumerate(alone()[: len(student)]) if g is not None}
    assert {id(student[i]) for i in reached} == {
        id(x) for x in (context.student.logits, *context.student.features.values())
    }
    assert all(p.grad is None for p in step.model.parameters())


def test_same_batch_and_proposals_in_every_step(tmp_path):
    cfg = distilled_cfg(tmp_path, ["CKD"])
    batch = benchmark.synthetic_batch(cfg, images=2, size=(64, 96))
    again = benchmark.synthetic_batch(cfg, images=2, size=(64, 96))
    assert torch.equal(batch[1]["image"], again[1]["image"])
    step = benchmark.Step(cfg, batch, distilled=True)
    first, second = (benchmark.record_context(step).proposal_boxes for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_command_writes_json_that_compares_and_refuses_what_it_cannot_measure(tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(distilled_cfg(tmp_path, ["CKD"]).dump())
    out = tmp_path / "reports" / "a.json"
    arguments = ["--config-file", str(config), "--images", "1", "--size", "64", "96"]
    arguments += ["--repeats", "1", "--output", str(out)]
    assert report_file.main([*arguments, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8"]) == 0
    printed = capsys.readouterr().out
    assert "tiny: 1 images of 64x96, 8 proposals" in printed and "quartiles" in printed
    report = report_file.load_report(out)
    report_file.save_report(report, out)
    assert json.loads(out.read_text()) == report

    assert report_file.main(["--compare", str(out), str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\ntiny ") == 2 and "overhead ratio" in printed

    assert report_file.main([*arguments, "KD.ENABLED", "False"]) == 2
    assert "nothing is distilled" in capsys.readouterr().err
    assert report_file.main(["--compare", str(config)]) == 2
    assert "not a report" in capsys.readouterr().err


def test_report_that_is_none_is_refused(tmp_path):
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ConfigError, match="not a report"):
        report_file.load_report(tmp_path / "other.json")
