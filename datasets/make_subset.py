"""Writes the annotations of some images of a COCO-format file, for training with few labels.

    python datasets/make_subset.py bccd/train.json bccd/train_25.json --images 25

The images are drawn at random, the same for the same ``--seed``, and a larger subset contains the
smaller ones; all categories stay. No image is copied.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from kd_detectron.checkpoint.files import atomic_open
from kd_detectron.commands import exit_code
from kd_detectron.errors import ConfigError


def make_subset(source: str | Path, target: str | Path, images: int, *, seed: int = 0) -> None:
    """Writes ``target``: the COCO-format file ``source`` with ``images`` of its images.

    Raises:
        ConfigError: ``source`` is not COCO-format, has fewer images, or is ``target`` itself.
    """
    if Path(target).resolve() == Path(source).resolve():
        raise ConfigError(f"'{target}' would replace the annotations it is made of; name another")
    try:
        content = json.loads(Path(source).read_text())
        entries, annotations = content["images"], content["annotations"]
        identifiers = sorted(entry["id"] for entry in entries)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"'{source}' is not a COCO-format annotation file: {error!r}") from error
    if not 0 < images <= len(entries):
        raise ConfigError(
            f"--images is {images}, but '{source}' has {len(entries)} images; ask for 1 to"
            f" {len(entries)}"
        )
    random.Random(seed).shuffle(identifiers)
    kept = set(identifiers[:images])
    content["images"] = [entry for entry in entries if entry["id"] in kept]
    content["annotations"] = [entry for entry in annotations if entry.get("image_id") in kept]
    with atomic_open(str(target), "w") as file:
        json.dump(content, file)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a COCO-format annotation file")
    parser.add_argument("target", help="the file to write")
    parser.add_argument("--images", type=int, required=True, help="how many images to keep")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    def work():
        make_subset(options.source, options.target, options.images, seed=options.seed)
        print(f"{options.target}: {options.images} images of {options.source}")

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
