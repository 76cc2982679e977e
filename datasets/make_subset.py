"""Writes the annotations of some images of a COCO-format file, for training with few labels.

    python datasets/make_subset.py bccd/train.json bccd/train_25.json --images 25
    python datasets/make_subset.py bccd/train.json fit.json --images 160 --rest held_out.json

The images are drawn at random, the same for the same ``--seed``, and a larger subset contains the
smaller ones; all categories stay. ``--rest`` names a file for the images that were not drawn, such
as a held-out split. No image is copied.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from kd_detectron.atomic_files import atomic_open
from kd_detectron.commands import exit_code
from kd_detectron.errors import ConfigError


def make_subset(
    source: str | Path,
    target: str | Path,
    images: int,
    *,
    rest: str | Path | None = None,
    seed: int = 0,
) -> None:
    """Writes ``target``: the COCO-format file ``source`` with ``images`` of its images.

    ``rest`` is the file to write with the images that were not drawn, if any; ``seed`` that of the
    draw.

    Raises:
        ConfigError: ``source`` is not COCO-format, has fewer images (with ``rest`` at least one
            more is needed), or two of the files are the same.
    """
    named = [Path(path).resolve() for path in (source, target, rest) if path is not None]
    if len(set(named)) < len(named):
        raise ConfigError(
            f"source '{source}', target '{target}' and --rest '{rest or ''}' must be different"
            " files; name another"
        )
    try:
        content = json.loads(Path(source).read_text())
        entries, annotations = content["images"], content["annotations"]
        identifiers = sorted(entry["id"] for entry in entries)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"'{source}' is not a COCO-format annotation file: {error!r}") from error
    most = len(entries) - (rest is not None)
    if not 0 < images <= most:
        raise ConfigError(
            f"--images is {images}, but '{source}' has {len(entries)} images; ask for 1 to {most}"
        )
    random.Random(seed).shuffle(identifiers)
    for path, kept in ((target, identifiers[:images]), (rest, identifiers[images:])):
        if path is not None:
            kept = set(kept)
            part = {
                "images": [entry for entry in entries if entry["id"] in kept],
                "annotations": [entry for entry in annotations if entry.get("image_id") in kept],
            }
            with atomic_open(str(path), "w") as file:
                json.dump(content | part, file)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a COCO-format annotation file")
    parser.add_argument("target", help="the file to write")
    parser.add_argument("--images", type=int, required=True, help="how many images to keep")
    parser.add_argument("--rest", help="the file to write with the images that were not drawn")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    def work():
        make_subset(
            options.source, options.target, options.images, rest=options.rest, seed=options.seed
        )
        print(f"{options.target}: {options.images} images of {options.source}")
        if options.rest:
            print(f"{options.rest}: the others")

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
