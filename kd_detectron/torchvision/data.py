"""COCO-format data for torchvision's detectors: ``CocoDetection`` and torchvision's v2 transforms.

Classes are numbered from 1 in the order of their category ids; 0 is the background. Images without
an object are left out of training, as Detectron2 does; crowd regions and empty boxes as well.
An object without ``iscrowd`` is none, and one without ``area`` has its box's. Images are turned as
their EXIF orientation says, as Detectron2 does.
"""

import contextlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from kd_detectron.errors import ConfigError
from kd_detectron.seeding import seeded
from kd_detectron.worker_signals import heed_the_training_alone


class DetectionData(Dataset):
    """Images in [0, 1] and targets as torchvision's detectors take them.

    Args:
        annotations: a COCO-format file.
        images: the folder of the images.
        training: leave out images without objects, and flip images at random.
        masks: give the objects' masks.

    Attributes:
        class_names: names of the K classes, in the order of their labels 1..K.

    Raises:
        ConfigError: the files do not exist, or cannot be used as they are.
    """

    def __init__(
        self, annotations: str | Path, images: str | Path, *, training: bool, masks: bool = False
    ):
        for path, what in ((annotations, "annotation file"), (images, "image folder")):
            if not Path(path).exists():
                raise ConfigError(f"the {what} {path} does not exist; check its path")
        transforms = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        if training:
            transforms.insert(1, v2.RandomHorizontalFlip())
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress.
                plain = _UprightImages(
                    str(images), str(annotations), transforms=v2.Compose(transforms)
                )
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise ConfigError(
                f"{annotations} is not in COCO format ({type(error).__name__}: {error})"
            ) from error
        _check_ids(plain.coco.dataset, str(annotations))
        categories = sorted(plain.coco.cats.values(), key=lambda category: category["id"])
        self.class_names = [category["name"] for category in categories]
        self._labels = {category["id"]: i + 1 for i, category in enumerate(categories)}
        self._masks = masks
        for entry in plain.coco.dataset.get("annotations", []):
            self._complete(entry, str(annotations))
        if training:
            plain.ids = [number for number in plain.ids if self._has_objects(plain, number)]
        if not plain.ids:
            raise ConfigError(
                f"{annotations} has no image{' with an object' if training else ''}; choose another"
            )
        self.file_names = [plain.coco.imgs[number]["file_name"] for number in plain.ids]
        keys = {"boxes", "labels", "image_id", "iscrowd", "area"} | ({"masks"} if masks else set())
        self._data = wrap_dataset_for_transforms_v2(plain, target_keys=keys)

    def _complete(self, entry: dict, title: str) -> None:
        """Refuses an annotation that cannot be used; adds what files of other tools leave out."""
        name = f"{title}: the annotation of id {entry['id']}"
        box, category = entry.get("bbox"), entry.get("category_id")
        numbers = isinstance(box, list) and all(isinstance(x, int | float) for x in box)
        if not numbers or len(box) != 4:
            raise ConfigError(f"{name} has the bbox {box}; give [x, y, width, height] in pixels")
        if category not in self._labels:
            raise ConfigError(
                f"{name} has the category_id {category}, which 'categories' does not list; add this"
                " category or remove the annotation"
            )
        if self._masks and not entry.get("segmentation"):
            raise ConfigError(f"{name} has no segmentation, which a Mask R-CNN learns from; add it")
        for key, value in (("iscrowd", 0), ("area", box[2] * box[3])):
            if entry.get(key) is None:
                entry[key] = value

    @staticmethod
    def _has_objects(data: CocoDetection, number: int) -> bool:
        objects = data.coco.imgToAnns.get(number, [])
        return any(not x.get("iscrowd", 0) and min(x["bbox"][2:]) > 0 for x in objects)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict]:
        image, target = self._data[index]
        size = tuple(image.shape[-2:])
        if "boxes" not in target:
            boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size)
            target |= {"boxes": boxes, "labels": torch.zeros(0, dtype=torch.long)}
            target |= {"iscrowd": [], "area": []}
            if self._masks:
                target["masks"] = torch.zeros(0, *size, dtype=torch.uint8)
        labels = torch.tensor([self._labels[x] for x in target["labels"].tolist()])
        boxes = target["boxes"].as_subclass(torch.Tensor).float()
        crowd = torch.tensor(target["iscrowd"], dtype=torch.long)
        result = {
            "boxes": boxes,
            "labels": labels.long(),
            "iscrowd": crowd,
            "area": torch.tensor(target["area"], dtype=torch.float32),
        }
        if self._masks:
            result["masks"] = target["masks"].as_subclass(torch.Tensor).to(torch.uint8)
        return image.as_subclass(torch.Tensor), result


class _UprightImages(CocoDetection):
    """COCO data whose images are turned as their EXIF orientation says."""

    def _load_image(self, id: int) -> Image.Image:
        record = self.coco.imgs[id]
        path = Path(self.root, record["file_name"])
        try:
            with Image.open(path) as stored:
                image = ImageOps.exif_transpose(stored).convert("RGB")
        except OSError as error:
            raise OSError(f"the image {path} cannot be read: {error}") from error
        if image.size != stored.size == (record.get("width"), record.get("height")):
            raise ConfigError(
                f"{path} is {image.size} pixels wide and high when turned as its EXIF orientation "
                f"says, but annotated as {stored.size}; annotate it as it is shown, or remove its "
                "EXIF orientation"
            )
        return image


def _check_ids(content: dict, title: str) -> None:
    """Refuses repeated ids: pycocotools would take the last of each for all of them."""
    for key in ("images", "annotations"):
        counts = Counter(entry["id"] for entry in content.get(key, []))
        repeated = [number for number, count in counts.items() if count > 1]
        if repeated:
            raise ConfigError(
                f"{title}: {counts[repeated[0]]} of the {key} have the id {repeated[0]}; give each "
                "an id of its own"
            )


def trainable(target: dict) -> dict:
    """A target without crowd regions and empty boxes, and without what only evaluation reads."""
    boxes = target["boxes"]
    kept = (target["iscrowd"] == 0) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    return {key: target[key][kept] for key in ("boxes", "labels", "masks") if key in target}


class BatchesByIteration(Sampler):
    """The batches of a whole training as a function of seed and iteration.

    A resumed training continues with the batch after its last one. A batch is a list of positions
    in the training's stream of images, the same for any number of processes, with their indices.

    Args:
        length: images of the data set.
        batch_size: images of a step, over all processes.
        iterations: steps of the whole training.
        seed: of the order, and of what is drawn for the image at a position.
        start: the first iteration to give.
        rank, world_size: this process gets its share of each batch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        iterations: int,
        *,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.seed = seed
        self._arguments = length, batch_size, iterations
        self._start = start
        self._share = slice(rank, None, world_size)

    def __len__(self) -> int:
        return self._arguments[2]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        length, batch_size, iterations = self._arguments
        generator = torch.Generator().manual_seed(self.seed)
        waiting: list[int] = []
        for iteration in range(iterations):
            while len(waiting) < batch_size:
                waiting += torch.randperm(length, generator=generator).tolist()
            batch, waiting = waiting[:batch_size], waiting[batch_size:]
            if iteration >= self._start:
                numbered = list(enumerate(batch, start=iteration * batch_size))
                yield numbered[self._share]


class _SeededData(Dataset):
    """The image at (position, index), flipped or not as a function of seed and position alone."""

    def __init__(self, data: DetectionData, seed: int):
        self._data = data
        self._seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, dict]:
        position, index = key
        with seeded(self._seed, position):
            return self._data[index]


def train_loader(data: DetectionData, batches: BatchesByIteration, workers: int) -> DataLoader:
    """Batches of images and targets without what cannot be trained on."""
    return DataLoader(
        _SeededData(data, batches.seed),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate_for_training,
        worker_init_fn=heed_the_training_alone,
    )


def test_loader(data: DetectionData, batch_size: int, workers: int, shard: Sequence) -> DataLoader:
    """The images of ``shard`` in order, with everything that evaluation needs."""
    return DataLoader(
        data,
        batch_size=batch_size,
        sampler=shard,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=heed_the_training_alone,
    )


def _collate(items: list) -> tuple[list, list]:
    images, targets = zip(*items, strict=True)
    return list(images), list(targets)


def _collate_for_training(items: list) -> tuple[list, list]:
    images, targets = _collate(items)
    return images, [trainable(target) for target in targets]
