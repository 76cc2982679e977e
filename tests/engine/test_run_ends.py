"""How runs end: evaluated, interrupted, finished, extended; and what each leaves in its folder."""

import json
import os
import signal

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.modeling import META_ARCH_REGISTRY
from tiny_training import run_cfg, train

from kd_detectron.atomic_files import CheckpointWriteError
from kd_detectron.engine import DistillationTrainer
from kd_detectron.engine import main as command
from kd_detectron.engine.hooks import Interrupted
from kd_detectron.errors import ConfigError
from kd_detectron.modeling import DistilledRCNN

PLAIN = ["KD.ENABLED", False]


@pytest.fixture
def results(monkeypatch):
    """Evaluations take their results from this list; a function in it is called first."""
    results = []

    def test(cls, cfg, model, evaluators=None):
        result = results.pop(0)
        return result() if callable(result) else result

    monkeypatch.setattr(DistillationTrainer, "test", classmethod(test))
    return results


def ap(value):
    return {"bbox": {"AP": value}}


def files(cfg):
    return {name for name in os.listdir(cfg.OUTPUT_DIR) if name.endswith((".pth", ".json"))}


def read(cfg, name):
    with open(os.path.join(cfg.OUTPUT_DIR, name), encoding="utf-8") as file:
        return json.load(file) if name == "result.json" else file.read()


def records(cfg):
    return [json.loads(line) for line in read(cfg, "metrics.json").splitlines()]


def saved(cfg, name):
    return torch.load(os.path.join(cfg.OUTPUT_DIR, name), weights_only=True)


def assert_same_weights(one, other):
    for name, tensor in saved(one, "model_final.pth")["model"].items():
        assert torch.equal(tensor, saved(other, "model_final.pth")["model"][name]), name


def test_best_checkpoint_of_the_last_evaluation_is_not_the_one_to_resume_from(
    tmp_path, dataset, results
):
    results += map(ap, (1.0, 2.0))
    cfg = run_cfg(tmp_path, dataset, "run", [*PLAIN, "TEST.EVAL_PERIOD", 3])
    train(cfg)
    best = saved(cfg, "model_best.pth")
    assert best["iteration"] == best["trainer"]["iteration"] == 5
    assert best["best"] == {"bbox/AP": 2.0}
    assert read(cfg, "last_checkpoint") == "model_final.pth"


def test_extended_run_follows_the_uninterrupted_one(tmp_path, dataset, results):
    opts = [*PLAIN, "TEST.EVAL_PERIOD", 3, "SOLVER.STEPS", (5,)]
    results += map(ap, (1.0, 2.0, 3.0, 1.0, 2.0, 3.0))
    longer = [*opts, "SOLVER.MAX_ITER", 7, "SOLVER.CHECKPOINT_PERIOD", 4]
    straight = run_cfg(tmp_path, dataset, "straight", longer)
    train(straight)
    train(run_cfg(tmp_path, dataset, "run", [*opts, "SOLVER.CHECKPOINT_PERIOD", 4]))
    extended = run_cfg(tmp_path, dataset, "run", longer)
    assert train(extended, resume=True).start_iter == 6
    assert_same_weights(extended, straight)
    assert read(extended, "result.json")["iterations"] == 7


def test_extended_run_has_no_result_until_its_new_end(tmp_path, dataset, results):
    results += [ap(1.0)]
    train(run_cfg(tmp_path, dataset, "run", [*PLAIN, "SOLVER.CHECKPOINT_PERIOD", 4]))
    cfg = run_cfg(
        tmp_path,
        dataset,
        "run",
        [*PLAIN, "SOLVER.CHECKPOINT_PERIOD", 4, "SOLVER.MAX_ITER", 9],
    )
    train(cfg, resume=True, until=7)
    assert files(cfg) == {"model_0000003.pth", "model_0000005.pth", "metrics.json"}
    assert read(cfg, "last_checkpoint") == "model_0000005.pth"
    results += [ap(3.0)]
    train(cfg, resume=True)
    assert read(cfg, "result.json")["results"] == ap(3.0)


def test_finished_run_that_is_resumed_once_more_stays_as_it_is(tmp_path, dataset, results, capfd):
    results += [ap(1.0)]
    cfg = run_cfg(tmp_path, dataset, "run", PLAIN)
    path = tmp_path / "run.yaml"
    path.write_text(cfg.dump())
    assert command.main(["--config-file", str(path)]) == 0

    def state():
        folder = tmp_path / "run"
        return {name: (folder / name).stat().st_mtime_ns for name in files(cfg)}, records(cfg)

    before, config = state(), read(cfg, "config.yaml")
    command_line = ["--config-file", str(path), "--resume"]
    assert command.main(command_line) == 0
    assert "is finished after 6 iterations" in capfd.readouterr().out
    # The options of a run that does not go on are not those that it was trained with.
    assert command.main([*command_line, "SOLVER.BASE_LR", "0.5"]) == 0
    fewer = ["SOLVER.MAX_ITER", "5", "SOLVER.STEPS", "(4,)"]
    assert command.main([*command_line, *fewer]) == 2
    assert state() == before and read(cfg, "config.yaml") == config
    # Those of one that goes on are.
    results += [ap(2.0)]
    more = ["SOLVER.MAX_ITER", "7", "SOLVER.BASE_LR", "0.002"]
    assert command.main([*command_line, *more]) == 0
    assert "MAX_ITER: 7" in read(cfg, "config.yaml")
    assert "BASE_LR: 0.002" in read(cfg, "config.yaml")


def test_run_beyond_its_end_is_refused(tmp_path, dataset, results):
    results += [ap(1.0)]
    train(run_cfg(tmp_path, dataset, "run", PLAIN))
    with pytest.raises(ConfigError, match="SOLVER.MAX_ITER is 5 .* has done 6 iterations"):
        opts = [*PLAIN, "SOLVER.MAX_ITER", 5, "SOLVER.STEPS", (4,)]
        train(run_cfg(tmp_path, dataset, "run", opts), resume=True)


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)
    raise AssertionError("the evaluation went on after Ctrl-C")


def test_signal_in_the_final_evaluation_ends_it_and_a_resume_makes_up_for_it(
    tmp_path, dataset, results
):
    handler = signal.getsignal(signal.SIGINT)
    results += [ctrl_c, ap(4.0)]
    cfg = run_cfg(tmp_path, dataset, "run", PLAIN)
    with pytest.raises(Interrupted):
        train(cfg)
    assert signal.getsignal(signal.SIGINT) is handler
    assert "result.json" not in files(cfg)
    train(cfg, resume=True)
    assert read(cfg, "result.json")["results"] == ap(4.0)
    assert "student_final.pth" in files(cfg)
    evaluated = [x for x in records(cfg) if "bbox/AP" in x]
    assert [x["iteration"] for x in evaluated] == [6]


@pytest.mark.parametrize("averaged", [False, True])
def test_signal_in_an_evaluation_leaves_a_checkpoint_of_its_iteration(
    tmp_path, dataset, results, averaged
):
    opts = [*PLAIN, "TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 6]
    opts += ["SOLVER.EMA.ENABLED", averaged]
    straight, broken = (run_cfg(tmp_path, dataset, name, opts) for name in ("straight", "broken"))
    results += map(ap, (1.0, 2.0, 3.0))
    train(straight)
    results += [ap(1.0), ctrl_c, ap(3.0)]
    with pytest.raises(Interrupted) as stop:
        train(broken)
    assert "after iteration 3" in stop.value.message
    assert read(broken, "last_checkpoint") == "model_0000003.pth"
    train(broken, resume=True)
    assert_same_weights(broken, straight)


def test_best_result_is_known_to_a_resumed_run_without_its_metrics(tmp_path, dataset, results):
    opts = [*PLAIN, "TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 2]
    cfg = run_cfg(tmp_path, dataset, "run", opts)
    results += map(ap, (1.0, 5.0))
    train(cfg, until=4)
    os.remove(os.path.join(cfg.OUTPUT_DIR, "metrics.json"))
    results += [ap(3.0)]
    train(cfg, resume=True)
    assert saved(cfg, "model_best.pth")["iteration"] == 3


def test_best_checkpoint_is_chosen_by_the_first_of_two_datasets(tmp_path, dataset, results):
    name = dataset[0][0]
    opts = [*PLAIN, "TEST.EVAL_PERIOD", 3, "DATASETS.TEST", (name, "other")]
    results += [{name: ap(2.0), "other": ap(1.0)}, {name: ap(1.0), "other": ap(9.0)}]
    cfg = run_cfg(tmp_path, dataset, "run", opts)
    train(cfg)
    best = saved(cfg, "model_best.pth")
    assert best["iteration"] == 2 and best["best"] == {f"{name}/bbox/AP": 2.0}
    assert read(cfg, "result.json")["results"] == {name: ap(1.0), "other": ap(9.0)}


def test_results_with_augmentation_reach_result_and_metrics(
    tmp_path, dataset, results, monkeypatch
):
    results += [ap(1.0)]
    monkeypatch.setattr(
        DistillationTrainer,
        "test_with_augmentation",
        classmethod(lambda cls, cfg, model: {"bbox_TTA": {"AP": 2.0}}),
    )
    cfg = run_cfg(tmp_path, dataset, "run", [*PLAIN, "TEST.AUG.ENABLED", True])
    train(cfg)
    assert read(cfg, "result.json")["results"] == ap(1.0) | {"bbox_TTA": {"AP": 2.0}}
    assert records(cfg)[-1]["bbox_TTA/AP"] == 2.0


@pytest.fixture
def own_architecture():
    """Registers a meta-architecture of a user's own; unregisters it."""
    names = []

    def register(cls):
        META_ARCH_REGISTRY.register(cls)
        names.append(cls.__name__)
        return cls.__name__

    yield register
    for name in names:
        del META_ARCH_REGISTRY._obj_map[name]


def test_subclass_of_the_users_is_exported_as_the_plain_detector(
    tmp_path, dataset, results, own_architecture
):
    class Renamed(DistilledRCNN):
        pass

    name = own_architecture(Renamed)
    results += [ap(1.0)]
    cfg = run_cfg(tmp_path, dataset, "run", ["MODEL.META_ARCHITECTURE", name])
    train(cfg)
    assert "META_ARCHITECTURE: GeneralizedRCNN" in read(cfg, "student_final.yaml")


def test_run_whose_student_cannot_be_exported_has_its_result(
    tmp_path, dataset, results, own_architecture, caplog
):
    class WithALayer(DistilledRCNN):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.layer = torch.nn.Linear(2, 2)

    name = own_architecture(WithALayer)
    results += [ap(1.0)]
    cfg = run_cfg(tmp_path, dataset, "run", [*PLAIN, "MODEL.META_ARCHITECTURE", name])
    train(cfg)
    assert read(cfg, "result.json")["finished"]
    assert "student_final.pth was not written" in caplog.text and "layer.weight" in caplog.text


def test_export_that_failed_is_made_up_for_by_a_resume(tmp_path, dataset, results, monkeypatch):
    def disk_is_full(self):
        raise CheckpointWriteError("no space left")

    results += [ap(1.0), ap(1.0)]
    cfg = run_cfg(tmp_path, dataset, "run", PLAIN)
    with monkeypatch.context() as patch, pytest.raises(CheckpointWriteError):
        patch.setattr(DistillationTrainer, "export", disk_is_full)
        train(cfg)
    # With a result the command would say that there is nothing to do.
    assert "result.json" not in files(cfg)
    train(cfg, resume=True)
    assert read(cfg, "result.json")["finished"]
    assert "student_final.pth" in files(cfg)


def test_run_that_changed_its_teacher_leaves_no_checkpoint_to_go_on_from(tmp_path, dataset):
    cfg = run_cfg(tmp_path, dataset, "run", ["SOLVER.CHECKPOINT_PERIOD", 2])
    trainer = DistillationTrainer(cfg)
    trainer.resume_or_load(resume=False)

    class Overwrite(HookBase):
        def before_step(self):
            if self.trainer.iter == 3:
                next(self.trainer.model.teacher.model.parameters()).data.add_(1)

    trainer.register_hooks([Overwrite()])
    with pytest.raises(RuntimeError, match="the teacher .* changed during training"):
        trainer.train()
    assert {name for name in files(cfg) if name.startswith("model")} == {"model_0000001.pth"}


def test_failure_in_the_last_iteration_is_not_evaluated(tmp_path, dataset, results):
    results += [ap(1.0)]
    cfg = run_cfg(tmp_path, dataset, "run", PLAIN)
    train(cfg, until=5)  # of six
    assert results == [ap(1.0)]


def test_damaged_best_checkpoint_is_replaced(tmp_path, dataset, results, caplog):
    opts = [*PLAIN, "TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 3]
    cfg = run_cfg(tmp_path, dataset, "run", opts)
    results += map(ap, (9.0, 1.0, 1.0, 2.0))
    train(cfg, until=4)
    os.truncate(os.path.join(cfg.OUTPUT_DIR, "model_best.pth"), 1000)
    train(cfg, resume=True)
    assert "model_best.pth cannot be read" in caplog.text
    assert saved(cfg, "model_best.pth")["best"] == {"bbox/AP": 2.0}


def test_checkpoints_of_stops_and_of_damaged_files_are_counted_too(tmp_path, dataset, results):
    opts = [*PLAIN, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.CHECKPOINT_MAX_TO_KEEP", 2]
    opts += ["SOLVER.MAX_ITER", 12]
    cfg = run_cfg(tmp_path, dataset, "run", opts)

    def kept():
        return sorted(name for name in files(cfg) if name.startswith("model_0"))

    def stop_after(iteration):
        class Signal(HookBase):
            def before_step(self):
                if self.trainer.iter == iteration:
                    os.kill(os.getpid(), signal.SIGTERM)

        trainer = DistillationTrainer(cfg)
        trainer.resume_or_load(resume=True)
        trainer.register_hooks([Signal()])
        with pytest.raises(Interrupted):
            trainer.train()

    for iteration in (2, 4, 6):
        stop_after(iteration)
    assert kept() == ["model_0000004.pth", "model_0000005.pth", "model_0000006.pth"]
    train(cfg, resume=True, until=8)
    assert kept() == ["model_0000006.pth", "model_0000007.pth"]
    # A damaged one is trained and written again, which leaves the one before it.
    os.truncate(os.path.join(cfg.OUTPUT_DIR, "model_0000007.pth"), 1000)
    train(cfg, resume=True, until=8)
    assert kept() == ["model_0000006.pth", "model_0000007.pth"]


@pytest.mark.parametrize("period", [0, -1])
def test_period_of_checkpoints_that_is_none_is_refused(tmp_path, dataset, period):
    with pytest.raises(ConfigError, match=f"CHECKPOINT_PERIOD is {period}; .*1 or more"):
        train(run_cfg(tmp_path, dataset, "run", [*PLAIN, "SOLVER.CHECKPOINT_PERIOD", period]))
