"""Converts annotations in Pascal VOC's XML to one COCO-format file.

    python datasets/voc_to_coco.py BCCD datasets/bccd/train.json --split train

reads ``BCCD/Annotations/*.xml``, of which ``BCCD/ImageSets/Main/train.txt`` lists those of the
split; without ``--split`` all are converted. Images are looked for in ``BCCD/JPEGImages`` by the
name of the XML file, and their width and height are read from the image itself. The classes are
those of all XML files in alphabetical order, so that each split has the same, or ``--classes``.
Objects marked as difficult become crowds: neither trained on nor counted as missed.
"""

import argparse
import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from kd_detectron.atomic_files import atomic_open
from kd_detectron.commands import exit_code
from kd_detectron.errors import ConfigError, did_you_mean
from kd_detectron.preflight.annotations import image_size


def voc_to_coco(
    source: str | Path,
    *,
    split: str = "",
    images: str | Path | None = None,
    classes: Sequence[str] = (),
    one_based: bool = False,
) -> dict:
    """Returns the COCO-format content of a folder in Pascal VOC's layout.

    Args:
        source: the folder that holds ``Annotations/``.
        split: the name of a list in ``ImageSets/Main/``; empty for all annotations.
        images: the folder of the images, by default ``JPEGImages/`` of ``source``.
        classes: the class names in the order of their ids; by default all that occur, sorted.
        one_based: whether corners count pixels from 1 and include the last one, as in the VOC
            challenges' own files; otherwise they are coordinates.

    Raises:
        ConfigError: a file is missing or unreadable, or a class is not among ``classes``.
    """
    source = Path(source)
    images = Path(images or source / "JPEGImages")
    objects = {path.stem: _read(path) for path in sorted((source / "Annotations").glob("*.xml"))}
    names = list(objects)
    if split:
        listed = source / "ImageSets" / "Main" / f"{split}.txt"
        if not listed.is_file():
            raise ConfigError(f"--split is '{split}', but there is no '{listed}'")
        names = [line.split()[0] for line in listed.read_text().splitlines() if line.strip()]
    if not names:
        raise ConfigError(f"'{source / 'Annotations'}' holds no XML files; name its parent folder")
    classes = list(classes) or sorted({name for found in objects.values() for name, *_ in found})
    files = {Path(name).stem: name for name in (os.listdir(images) if images.is_dir() else ())}
    content: dict[str, list] = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
    for image_id, stem in enumerate(names, start=1):
        size = image_size(str(images / files[stem])) if stem in files else None
        if stem not in objects or size is None:
            raise ConfigError(
                f"'{stem}' needs '{source / 'Annotations' / stem}.xml' and a readable image of that"
                f" name in '{images}'; put them there, or name the folder by --images"
            )
        entry = {"id": image_id, "file_name": files[stem], "width": size[0], "height": size[1]}
        content["images"].append(entry)
        for name, difficult, (x0, y0, x1, y1) in objects[stem]:
            if name not in classes:
                near = did_you_mean(name, classes)
                raise ConfigError(f"'{stem}.xml' has the class '{name}', not in --classes{near}")
            x, y = x0 - one_based, y0 - one_based
            annotation = {
                "id": len(content["annotations"]) + 1,
                "image_id": image_id,
                "category_id": classes.index(name) + 1,
                "bbox": [x, y, x1 - x, y1 - y],
                "area": (x1 - x) * (y1 - y),
                "iscrowd": difficult,
            }
            content["annotations"].append(annotation)
    return content


def _read(path: Path) -> list[tuple[str, int, list[float]]]:
    """Class, whether it is difficult, and corners of each object in an XML file."""
    try:
        return [
            (
                item.findtext("name").strip(),
                int(item.findtext("difficult") or 0),
                [
                    float(item.findtext(f"bndbox/{side}"))
                    for side in ("xmin", "ymin", "xmax", "ymax")
                ],
            )
            for item in ElementTree.parse(path).iter("object")
        ]
    except (ElementTree.ParseError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"'{path}' is not an annotation in Pascal VOC's XML: {error}") from error


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="the folder that holds Annotations/")
    parser.add_argument("target", help="the COCO-format file to write")
    parser.add_argument("--split", default="", help="a list in ImageSets/Main/, such as train")
    parser.add_argument("--images", help="the folder of the images, if not JPEGImages/")
    parser.add_argument(
        "--classes", nargs="+", default=(), help="class names in order of their ids"
    )
    parser.add_argument(
        "--one-based",
        action="store_true",
        help="corners count pixels from 1 and include the last one, as in the VOC challenges",
    )
    options = vars(parser.parse_args(arguments))

    def work() -> None:
        target = options.pop("target")
        content = voc_to_coco(options.pop("source"), **options)
        os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
        with atomic_open(target, "w") as file:
            json.dump(content, file)
        names = ", ".join(category["name"] for category in content["categories"])
        counts = f"{len(content['images'])} images, {len(content['annotations'])} annotations"
        print(f"{target}: {counts}, classes {names}")

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
