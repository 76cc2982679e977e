"""The batch of iteration i is a function of seed, ranks and i, and of nothing else."""

import dataclasses
import logging
import random
from itertools import islice

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetMapper,
    build_detection_train_loader,
    get_detection_dataset_dicts,
    samplers,
)
from detectron2.data import transforms as T
from detectron2.utils import comm

from kd_detectron.data import build_lazy_train_loader, build_train_loader, register_coco_format
from kd_detectron.errors import ConfigError, CorruptImageError


@pytest.fixture
def build(make_cfg):
    """Returns a function that builds a loader of the tiny dataset, options by config key."""

    def make(content=None, mapper=None, **options):
        cfg = make_cfg(content)
        cfg.merge_from_list([part for option in options.items() for part in option])
        register_coco_format(cfg)
        return build_train_loader(cfg, mapper)

    return make


def batches(loader, count):
    return list(islice(iter(loader), count))


def names(batch):
    return [element["file_name"].rsplit("/", 1)[-1] for element in batch]


def assert_same(some, others):
    assert len(some) == len(others)
    for batch, other in zip(some, others, strict=True):
        assert names(batch) == names(other)
        for element, twin in zip(batch, other, strict=True):
            assert torch.equal(element["image"], twin["image"])
            boxes = element["instances"].gt_boxes.tensor
            assert torch.equal(boxes, twin["instances"].gt_boxes.tensor)


def as_rank(monkeypatch, rank, world_size):
    monkeypatch.setattr(comm, "get_rank", lambda: rank)
    monkeypatch.setattr(comm, "get_world_size", lambda: world_size)


def test_batches_and_augmentation_do_not_depend_on_the_number_of_workers(build):
    alone = batches(build(), 8)
    assert len({tuple(e["image"].shape) for batch in alone for e in batch}) > 2  # augmented
    assert_same(alone, batches(build(**{"DATALOADER.NUM_WORKERS": 2}), 8))


@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_seek_equals_dropping_batches(build, grouping, workers):
    options = {"DATALOADER.ASPECT_RATIO_GROUPING": grouping, "DATALOADER.NUM_WORKERS": workers}
    whole = batches(build(**options), 10)
    resumed = build(**options)
    resumed.seek(7, 6)
    assert_same(whole[6:], batches(resumed, 4))


def test_skipping_reads_no_image(build):
    read = []
    loader = build(mapper=lambda record: read.append(record["file_name"]) or dict(record))
    loader.seek(7, 1000)
    batches(loader, 1)
    assert len(read) == 2


def test_iterating_again_starts_again(build):
    loader = build()
    assert_same(batches(loader, 3), batches(loader, 3))


def test_another_seed_gives_other_batches(build):
    loader = build()
    first = [names(batch) for batch in batches(loader, 6)]
    loader.seek(8, 0)
    assert first != [names(batch) for batch in batches(loader, 6)]


def test_same_image_is_augmented_differently_at_another_position(build, make_coco):
    loader = build(make_coco(1), **{"SOLVER.IMS_PER_BATCH": 1})
    images = [batch[0]["image"] for batch in batches(loader, 8)]
    assert any(
        image.shape != images[0].shape or not torch.equal(image, images[0]) for image in images
    )


def test_aspect_ratios_are_not_mixed_in_a_batch(build):
    for batch in batches(build(), 12):
        assert len({element["width"] > element["height"] for element in batch}) == 1


def test_images_without_sizes_are_in_one_group(build):
    loader = build()
    records = [{"file_name": record["file_name"]} for record in loader.dataset_dicts]
    assert dataclasses.replace(loader, dataset_dicts=records)._groups == [False] * 6


def test_ranks_share_out_the_stream_of_one_process(build, monkeypatch):
    options = {"SOLVER.IMS_PER_BATCH": 4, "DATALOADER.ASPECT_RATIO_GROUPING": False}
    alone = batches(build(**options), 5)
    ranks = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        ranks.append(batches(build(**options), 5))
    for batch, *shares in zip(alone, *ranks, strict=True):
        assert [len(share) for share in shares] == [2, 2]
        # Position p of the batch goes to rank p % 2, augmented as in one process.
        assert_same([batch[0::2], batch[1::2]], shares)


def test_an_epoch_over_all_ranks_holds_every_image_once(build, monkeypatch):
    options = {"DATALOADER.ASPECT_RATIO_GROUPING": False, "SOLVER.IMS_PER_BATCH": 2}
    seen = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        seen += [name for batch in batches(build(**options), 3) for name in names(batch)]
    assert sorted(seen) == [f"{number}.png" for number in range(6)]


@pytest.mark.parametrize("total", [3, 0, 1])
def test_batch_that_cannot_be_shared_out_is_refused(build, monkeypatch, total):
    as_rank(monkeypatch, 0, 2)
    with pytest.raises(ConfigError, match=f"SOLVER.IMS_PER_BATCH is {total} for 2 processes"):
        build(**{"SOLVER.IMS_PER_BATCH": total})


def test_loading_leaves_the_random_states_alone(build):
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    batches(build(), 3)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert before == after


@pytest.mark.parametrize(("images", "total"), [(1, 1), (1, 5), (2, 7), (3, 2)])
def test_batch_may_be_larger_than_the_dataset(build, images, total, make_coco):
    loader = build(make_coco(images), **{"SOLVER.IMS_PER_BATCH": total})
    assert [len(batch) for batch in batches(loader, 3)] == [total] * 3


def test_images_without_annotations_are_left_out_if_so_configured(build, make_coco):
    content = make_coco(6)
    del content["annotations"][0]
    seen = {name for batch in batches(build(content), 12) for name in names(batch)}
    assert "0.png" not in seen and len(seen) == 5
    loader = build(content, **{"DATALOADER.FILTER_EMPTY_ANNOTATIONS": False})
    assert "0.png" in {name for batch in batches(loader, 12) for name in names(batch)}


def test_repeat_factor_sampler_is_resumable(build, make_coco):
    content = make_coco(9)
    for annotation in content["annotations"]:
        annotation["category_id"] = 1
    content["annotations"][4]["category_id"] = 2
    options = {
        "DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler",
        "DATALOADER.REPEAT_THRESHOLD": 0.9,
    }
    whole = batches(build(content, **options), 20)
    seen = [name for batch in whole for name in names(batch)]
    assert seen.count("4.png") > max(seen.count(f"{n}.png") for n in range(9) if n != 4)
    resumed = build(content, **options)
    resumed.seek(7, 15)
    assert_same(whole[15:], batches(resumed, 5))


def lazy_loader(**options):
    """``dataloader.train`` of a LazyConfig that says what the fixtures' YAML config says."""
    augmentations = [
        L(T.ResizeShortestEdge)(
            short_edge_length=(16, 20, 24), max_size=1333, sample_style="choice"
        ),
        L(T.RandomFlip)(),
    ]
    arguments = {
        "dataset": L(get_detection_dataset_dicts)(names="tiny"),
        "mapper": L(DatasetMapper)(is_train=True, augmentations=augmentations, image_format="BGR"),
        "total_batch_size": 2,
    }
    return L(build_detection_train_loader)(**arguments | options)


def test_loader_of_a_lazy_config_gives_the_batches_of_its_yaml_twin(build):
    expected = batches(build(), 8)
    loader = build_lazy_train_loader(lazy_loader(), seed=7)
    assert_same(expected, batches(loader, 8))
    loader.seek(7, 5)
    assert_same(expected[5:], batches(loader, 3))


def test_sampler_of_a_lazy_config_is_seeded_by_the_run(build):
    build()
    sampler = L(samplers.RepeatFactorTrainingSampler)(repeat_factors=torch.ones(6))
    loader = build_lazy_train_loader(lazy_loader(sampler=sampler), seed=7)
    whole = batches(loader, 8)
    loader.seek(7, 5)
    assert_same(whole[5:], batches(loader, 3))
    loader.seek(8, 0)
    assert list(map(names, batches(loader, 8))) != list(map(names, whole))


@pytest.mark.parametrize(
    "node",
    [
        L(list)(),
        lazy_loader(sampler=L(samplers.InferenceSampler)(size=6)),
        lazy_loader(collate_fn=list),
        lazy_loader(dataset=L(tuple)()),
    ],
)
def test_loader_that_cannot_be_foreseen_is_left_to_the_lazy_config(node):
    assert build_lazy_train_loader(node, seed=7) is None


def test_unknown_sampler_is_refused(build):
    with pytest.raises(ConfigError, match="SAMPLER_TRAIN is 'TrainingSample'.*TrainingSampler"):
        build(**{"DATALOADER.SAMPLER_TRAIN": "TrainingSample"})


def test_mapper_that_returns_none_gets_another_image(build):
    def picky(record):
        if record["file_name"].endswith("/1.png"):
            return None
        return {**record, "draw": random.random() + np.random.rand() + torch.rand(()).item()}

    def draws(loader):
        return [[(e["file_name"], e["draw"]) for e in batch] for batch in batches(loader, 9)]

    first = draws(build(mapper=picky))
    assert all(not name.endswith("/1.png") for batch in first for name, _ in batch)
    assert first == draws(build(mapper=picky, **{"DATALOADER.NUM_WORKERS": 2}))


def test_mapper_that_returns_none_for_all_is_an_error(build):
    with pytest.raises(RuntimeError, match="no usable image"):
        batches(build(mapper=lambda record: None), 1)


def test_fault_of_the_mapper_is_not_taken_for_a_corrupt_image(build):
    def broken(record):
        raise ZeroDivisionError("a bug")

    with pytest.raises(RuntimeError, match="the mapper failed on image '.*png'"):
        batches(build(mapper=broken, **{"DATALOADER.MAX_CORRUPT_IMAGES": 5}), 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_image_stops_the_run_and_is_named(build, tmp_path, workers):
    loader = build(**{"DATALOADER.NUM_WORKERS": workers})
    (tmp_path / "tiny" / "images" / "2.png").write_bytes(b"not an image")
    with pytest.raises(
        CorruptImageError, match=r"image '.*/2\.png'.*DATALOADER.MAX_CORRUPT_IMAGES is 0"
    ):
        batches(loader, 12)


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_image_is_replaced_by_the_next_and_logged(build, tmp_path, caplog, workers):
    whole = [names(batch) for batch in batches(build(), 12)]
    options = {"DATALOADER.MAX_CORRUPT_IMAGES": 1, "DATALOADER.NUM_WORKERS": workers}
    loader = build(**options)
    image = tmp_path / "tiny" / "images" / "2.png"
    image.write_bytes(image.read_bytes()[:100])  # cut off
    with caplog.at_level(logging.WARNING):
        found = [names(batch) for batch in batches(loader, 12)]
    assert found == [[name.replace("2.png", "3.png") for name in batch] for batch in whole]
    assert "Skipped image" in caplog.text and "2.png" in caplog.text


def test_more_corrupt_images_than_allowed_stop_the_run(build, tmp_path):
    loader = build(**{"DATALOADER.MAX_CORRUPT_IMAGES": 1})
    for number in (2, 4):
        (tmp_path / "tiny" / "images" / f"{number}.png").write_bytes(b"")
    with pytest.raises(CorruptImageError, match="MAX_CORRUPT_IMAGES to at least 2"):
        batches(loader, 20)


def test_dataset_of_corrupt_images_only_ends_with_an_error(build, tmp_path, make_coco):
    loader = build(make_coco(2), **{"DATALOADER.MAX_CORRUPT_IMAGES": 1})
    for number in range(2):
        (tmp_path / "tiny" / "images" / f"{number}.png").unlink()
    with pytest.raises(CorruptImageError, match="cannot use image"):
        batches(loader, 1)


def test_image_of_another_size_than_annotated_counts_as_corrupt(build, make_coco):
    content = make_coco(2)
    loader = build(content)
    content["images"][0]["width"] += 1
    advice = "repair it or correct its annotated size"
    with pytest.raises(CorruptImageError, match=f"Mismatched image shape.*{advice}"):
        batches(build_with_wrong_size(loader, content), 6)


def build_with_wrong_size(loader, content):
    """The same loader, on dataset dicts whose first image is annotated with another width."""
    dicts = [dict(record) for record in loader.dataset_dicts]
    dicts[0]["width"] = content["images"][0]["width"]
    loader.dataset_dicts = dicts
    return loader


def test_default_mapper_is_detectron2s(build):
    assert isinstance(build().mapper, DatasetMapper)
