"""A training loader whose batch of iteration i depends on nothing but seed, ranks and i.

With Detectron2's loader a resumed run sees other images than an uninterrupted one. Here:

1. Detectron2's own sampler gives the endless stream of dataset indices; every element has a
   position in it, the same for any number of processes. Rank r of W takes positions r, r+W, ...
2. Batches are formed in the main process from indices and the annotated image sizes (grouped by
   aspect ratio as in Detectron2), so that skipping to iteration i reads no image.
3. A worker maps the element at a position with Python's, numpy's and torch's random states seeded
   from (seed, position), and puts the previous states back.

An element that cannot be used is replaced by the next image of the dataset.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import (
    DatasetFromList,
    DatasetMapper,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.build import trivial_batch_collator
from detectron2.data.detection_utils import SizeMismatchError, read_image
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset, Sampler

from kd_detectron.data.coco_format import name_keypoints
from kd_detectron.errors import ConfigError, CorruptImageError, did_you_mean
from kd_detectron.seeding import seeded
from kd_detectron.worker_signals import heed_the_training_alone

logger = logging.getLogger(__name__)


def build_train_loader(
    cfg: CfgNode, mapper: Callable[[dict], dict | None] | None = None
) -> "ResumableLoader":
    """Builds the training loader of a config.

    Args:
        cfg: a whole config.
        mapper: turns a dataset dict into a model input; Detectron2's ``DatasetMapper`` by default.
            Where it returns None another image is taken.

    Raises:
        ConfigError: the batch cannot be divided among the processes, or the sampler is unknown.
    """
    min_keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    dataset_dicts = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=min_keypoints if cfg.MODEL.KEYPOINT_ON else 0,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )
    if cfg.MODEL.KEYPOINT_ON:
        name_keypoints(cfg.DATASETS.TRAIN)
    return ResumableLoader(
        dataset_dicts,
        mapper if mapper is not None else DatasetMapper(cfg, is_train=True),
        _sampler_factory(cfg, dataset_dicts),
        cfg.SOLVER.IMS_PER_BATCH,
        seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
        group_by_aspect_ratio=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        max_corrupt_images=cfg.DATALOADER.MAX_CORRUPT_IMAGES,
    )


def build_lazy_train_loader(
    node: DictConfig, *, seed: int, max_corrupt_images: int = 0
) -> "ResumableLoader | None":
    """Builds the training loader that a LazyConfig's ``dataloader.train`` describes.

    Args:
        node: a call of Detectron2's ``build_detection_train_loader``, with its default sampler or
            one of those that :func:`build_train_loader` knows.
        seed: the run's seed, not negative.
        max_corrupt_images: as ``DATALOADER.MAX_CORRUPT_IMAGES``.

    Returns:
        The loader; None for any other loader, whose batches this project cannot foresee.
    """
    known = ("_target_", "dataset", "mapper", "sampler", "total_batch_size", "num_workers")
    sampler = node.get("sampler")
    if (
        not _calls(node, build_detection_train_loader)
        or set(node) - {*known, "aspect_ratio_grouping"}
        or not (sampler is None or _calls(sampler, TrainingSampler, RepeatFactorTrainingSampler))
    ):
        return None
    dataset_dicts = instantiate(node.dataset)
    if not isinstance(dataset_dicts, list):
        return None

    def make_sampler(seed: int) -> Sampler:
        if sampler is None:
            return TrainingSampler(len(dataset_dicts), seed=seed)
        sampler.seed = seed
        return instantiate(sampler)

    return ResumableLoader(
        dataset_dicts,
        instantiate(node.mapper),
        make_sampler,
        node.total_batch_size,
        seed=seed,
        group_by_aspect_ratio=node.get("aspect_ratio_grouping", True),
        num_workers=node.get("num_workers", 0),
        max_corrupt_images=max_corrupt_images,
    )


def _calls(node, *targets: Callable) -> bool:
    """Whether a LazyConfig's node is a call of one of these."""
    return isinstance(node, Mapping) and node.get("_target_") in targets


@dataclass(eq=False)
class ResumableLoader:
    """Endless batches; iterating starts at the iteration that :meth:`seek` named.

    Args:
        dataset_dicts: images in Detectron2's format; those without a size are one group.
        mapper: turns a dataset dict into a model input, or None to have another image taken.
        make_sampler: builds, for a seed, this rank's sampler of indices into ``dataset_dicts``.
        total_batch_size: images of a batch on all ranks.
        seed: seed of the stream until :meth:`seek` names another.
        group_by_aspect_ratio: batches of only wide or only high images.
        num_workers: processes that load images; 0 loads in this one.
        max_corrupt_images: different unreadable images to replace before giving up.

    Raises:
        ConfigError: the batch cannot be divided among the processes.
    """

    dataset_dicts: Sequence[dict]
    mapper: Callable[[dict], dict | None]
    make_sampler: Callable[[int], Sampler]
    total_batch_size: int
    seed: int
    group_by_aspect_ratio: bool = True
    num_workers: int = 0
    max_corrupt_images: int = 0

    def __post_init__(self):
        total, world_size = self.total_batch_size, comm.get_world_size()
        if total < 1 or total % world_size:
            raise ConfigError(
                f"SOLVER.IMS_PER_BATCH is {total} for {world_size} processes; set it to a multiple"
                f" of {world_size}"
            )
        self._groups = [False] * len(self.dataset_dicts)
        if self.group_by_aspect_ratio:
            self._groups = [x.get("width", 0) > x.get("height", 0) for x in self.dataset_dicts]
        self.dataset_dicts = DatasetFromList(self.dataset_dicts, copy=False)
        self._iteration = 0
        self._corrupt: set[str] = set()

    def seek(self, seed: int, iteration: int) -> None:
        """Sets the stream's seed and the first batch that the next ``iter()`` gives."""
        self.seed = seed
        self._iteration = iteration

    def __iter__(self) -> Iterator[list[dict]]:
        mapper = PicklableWrapper(self.mapper)
        loader = DataLoader(
            _SeededDataset(self.dataset_dicts, mapper, self.seed, self.max_corrupt_images),
            batch_sampler=islice(self._batches(), self._iteration, None),
            num_workers=self.num_workers,
            collate_fn=trivial_batch_collator,
            worker_init_fn=heed_the_training_alone,
            # A generator of its own: otherwise starting the loader draws from the global state,
            # and a resumed run's draws would no longer follow the uninterrupted one's.
            generator=torch.Generator().manual_seed(self.seed),
        )
        for elements in loader:
            for _, file_name, corrupt in elements:
                self._note_corrupt(file_name, corrupt)
            yield [data for data, _, _ in elements]

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        """This rank's batches of (position, index) pairs, from the first."""
        waiting: dict[bool, list] = {False: [], True: []}
        rank, world_size = comm.get_rank(), comm.get_world_size()
        batch_size = self.total_batch_size // world_size
        for count, index in enumerate(self.make_sampler(self.seed)):
            batch = waiting[self._groups[index]]
            batch.append((rank + count * world_size, index))
            if len(batch) == batch_size:
                yield batch[:]
                batch.clear()

    def _note_corrupt(self, taken: str, corrupt: dict[str, str]) -> None:
        # Here and not in the workers, so that one count holds whatever their number.
        for file_name, reason in corrupt.items():
            self._corrupt.add(file_name)
            count, most = len(self._corrupt), self.max_corrupt_images
            if count > most:
                raise CorruptImageError(
                    f"cannot use image '{file_name}' ({reason}) and DATALOADER.MAX_CORRUPT_IMAGES"
                    f" is {most}; repair it or correct its annotated size, or set"
                    f" DATALOADER.MAX_CORRUPT_IMAGES to at least {count}, and --resume"
                )
            logger.warning(
                "Skipped image '%s' (%s), taking '%s' instead; %d of at most %d such images",
                *(file_name, reason, taken, count, most),
            )


def _sampler_factory(cfg: CfgNode, dataset_dicts: list[dict]) -> Callable[[int], Sampler]:
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return lambda seed: TrainingSampler(len(dataset_dicts), seed=seed)
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dataset_dicts, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
        return lambda seed: RepeatFactorTrainingSampler(factors, seed=seed)
    raise ConfigError(
        f"DATALOADER.SAMPLER_TRAIN is '{name}', which cannot be resumed exactly"
        + did_you_mean(name, ["TrainingSampler", "RepeatFactorTrainingSampler"])
    )


@dataclass(frozen=True)
class _SeededDataset(Dataset):
    """Maps the image at (position, index), as a function of (seed, position, index) alone."""

    dicts: DatasetFromList
    mapper: Callable[[dict], dict | None]
    seed: int
    max_corrupt_images: int

    def __len__(self) -> int:
        return len(self.dicts)

    def __getitem__(self, key: tuple[int, int]) -> tuple[dict | None, str, dict[str, str]]:
        """The mapped image, its file name, and what was skipped before (file name: reason)."""
        position, index = key
        corrupt: dict[str, str] = {}
        with seeded(self.seed, position):
            for attempt in range(10 * len(self.dicts)):
                record = self.dicts[(index + attempt) % len(self.dicts)]
                file_name = record["file_name"]
                try:
                    data = self.mapper(record)
                except Exception as error:
                    data, corrupt[file_name] = None, _reason(file_name, error)
                if data is not None or len(corrupt) > self.max_corrupt_images:
                    return data, file_name, corrupt
        raise RuntimeError(f"no usable image was found in many tries, the last is '{file_name}'")


def _reason(file_name: str, error: Exception) -> str:
    """Why an image cannot be used; raises if the image is not the reason."""
    if isinstance(error, SizeMismatchError):
        return str(error)
    try:
        read_image(file_name)
    except Exception as unreadable:
        return f"{type(unreadable).__name__}: {unreadable}"
    raise RuntimeError(f"the mapper failed on image '{file_name}'") from error
