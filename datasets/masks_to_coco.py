"""Converts images with one mask file per object to one COCO-format file and a folder of images.

    python datasets/masks_to_coco.py stage1_train datasets/nuclei/train.json --name nucleus

reads ``stage1_train/<id>/images/*.png``, one image per id, and ``stage1_train/<id>/masks/*.png``,
one file per object, non-zero where the object is: the layout of the 2018 Data Science Bowl
(BBBC038). The images are written as JPEG files to ``images/`` beside the annotation file, the masks
as RLE in it. ``--list FILE`` takes the ids of a text file, one per line, in its order; the first
letters of an id are enough if no other id starts with them.
"""

import argparse
import json
import sys
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as rle

from kd_detectron.atomic_files import atomic_open
from kd_detectron.commands import exit_code
from kd_detectron.errors import ConfigError

QUALITY = 93  # of the JPEG files


def masks_to_coco(
    source: str | Path,
    images: str | Path,
    *,
    ids: list[str] | None = None,
    name: str = "object",
    min_area: int = 1,
) -> dict:
    """Writes the images as ``images/<id>.jpg`` and returns the COCO-format content.

    Args:
        source: the folder that holds one folder per image.
        images: the folder to write the images to; it is made if need be.
        ids: names of folders of ``source``, or their unique first letters; by default all, sorted.
        name: the name of the one class.
        min_area: objects of fewer pixels are left out.

    Raises:
        ConfigError: a folder or file is missing or unreadable, or a mask has another size than its
            image.
    """
    source, images = Path(source), Path(images)
    folders = sorted(path.name for path in source.iterdir()) if source.is_dir() else []
    if not folders:
        raise ConfigError(f"'{source}' holds no folders; name the folder with one folder per image")
    images.mkdir(parents=True, exist_ok=True)
    content: dict[str, list] = {"images": [], "annotations": []}
    content["categories"] = [{"id": 1, "name": name}]
    for image_id, short in enumerate(folders if ids is None else ids, start=1):
        folder = source / _folder(short, folders, source)
        files = sorted((folder / "images").glob("*.png"))
        if len(files) != 1:
            raise ConfigError(f"'{folder / 'images'}' holds {len(files)} PNG files; it needs one")
        image = _read(files[0], cv2.IMREAD_COLOR)
        height, width = image.shape[:2]
        file_name = f"{short}.jpg"
        if not cv2.imwrite(str(images / file_name), image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY]):
            raise ConfigError(f"'{images / file_name}' could not be written")
        entry = {"id": image_id, "file_name": file_name, "width": width, "height": height}
        content["images"].append(entry)
        for path in sorted((folder / "masks").glob("*.png")):
            mask = _read(path, cv2.IMREAD_GRAYSCALE) > 0
            if mask.shape != (height, width):
                raise ConfigError(
                    f"'{path}' has {mask.shape[1]} x {mask.shape[0]} pixels and its image"
                    f" {width} x {height}; a mask needs the size of its image"
                )
            if mask.sum() < min_area:
                continue
            encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
            annotation = {
                "id": len(content["annotations"]) + 1,
                "image_id": image_id,
                "category_id": 1,
                "bbox": rle.toBbox(encoded).tolist(),
                "area": float(rle.area(encoded)),
                "iscrowd": 0,
                "segmentation": {**encoded, "counts": encoded["counts"].decode()},
            }
            content["annotations"].append(annotation)
    return content


def _folder(short: str, folders: list[str], source: Path) -> str:
    """The one of ``folders`` that is called ``short`` or starts so."""
    if short in folders:
        return short
    found = [folder for folder in folders if folder.startswith(short)]
    if len(found) != 1:
        raise ConfigError(
            f"'{short}' is listed, but {len(found)} folders of '{source}' start so; it needs one"
        )
    return found[0]


def _read(path: Path, flag: int) -> np.ndarray:
    image = cv2.imread(str(path), flag)
    if image is None:
        raise ConfigError(f"'{path}' cannot be read as an image; download it again")
    return image


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="the folder that holds one folder per image")
    parser.add_argument("target", help="the COCO-format file to write; images/ is made beside it")
    parser.add_argument("--list", help="a text file of ids, one per line; by default all")
    parser.add_argument("--name", default="object", help="the name of the class")
    parser.add_argument(
        "--min-area", type=int, default=1, help="objects of fewer pixels are left out"
    )
    options = parser.parse_args(arguments)

    def work() -> None:
        target = Path(options.target)
        ids = None
        if options.list:
            if not Path(options.list).is_file():
                raise ConfigError(f"--list is '{options.list}', but there is no such file")
            ids = Path(options.list).read_text().split()
        content = masks_to_coco(
            options.source,
            target.parent / "images",
            ids=ids,
            name=options.name,
            min_area=options.min_area,
        )
        with atomic_open(str(target), "w") as file:
            json.dump(content, file)
        counts = f"{len(content['images'])} images, {len(content['annotations'])} annotations"
        print(f"{target}: {counts}, class {options.name}")

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
