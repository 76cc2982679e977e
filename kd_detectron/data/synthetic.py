"""A small synthetic detection dataset in COCO format, made in seconds, the same for the same seed.

For the demo and for trying things without downloading: coloured shapes of four classes, with masks
and boxes. A detector learns it from scratch in minutes: a class has a shape and a hue of its own,
and shapes never overlap.

Shapes are drawn, and their masks traced, at four times the size. Every image has its own random
stream, (seed, split, number), so that a larger set begins with the images of the smaller one.
"""

import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np

from kd_detectron.errors import ConfigError

SYNTHETIC_CLASSES = ("disc", "square", "triangle", "star")

# Pixels of the drawing per pixel of the image, in each direction.
_FINE = 4
# An object must have this part of its area inside the image, or it is placed elsewhere.
_MIN_INSIDE = 0.75
# Smallest and largest radius of an object, as parts of the image's shorter side.
_RADII = (0.1, 0.22)
# Standard deviation of an object's hue around its class's, of 180; the classes are 45 apart.
_HUE_SPREAD = 5
_MARKER = "synthetic.json"


def make_synthetic(
    out_dir: str | os.PathLike,
    num_train: int = 400,
    num_val: int = 100,
    *,
    image_size: tuple[int, int] = (160, 160),
    seed: int = 0,
) -> Path:
    """Writes ``train.json``, ``val.json``, ``train/`` and ``val/`` into ``out_dir``.

    The set is made in ``<out_dir>.partial`` and renamed when complete. A finished set with the same
    arguments is left as it is; one with other arguments is replaced. Not for several processes at
    the same ``out_dir``.

    Args:
        out_dir: the folder to make.
        num_train, num_val: number of images of the two splits.
        image_size: height and width of the images in pixels.
        seed: any non-negative integer; the same seed gives the same files, byte for byte.

    Raises:
        ConfigError: ``out_dir`` holds something else.
    """
    out_dir = Path(out_dir)
    splits = {"train": num_train, "val": num_val}
    arguments = {**splits, "image_size": list(image_size), "seed": seed, "version": 3}
    marker = out_dir / _MARKER
    if marker.is_file() and marker.read_text(encoding="utf-8") == json.dumps(arguments) + "\n":
        return out_dir
    if out_dir.exists() and any(out_dir.iterdir()) and not marker.is_file():
        raise ConfigError(
            f"'{out_dir}' exists and is not a synthetic dataset made earlier; choose another folder"
            " or remove it"
        )

    partial = out_dir.with_name(out_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for number, (split, count) in enumerate(splits.items()):
        content = {
            "info": {"description": "kd_detectron synthetic shapes", **arguments},
            **_write_images(partial / split, count, image_size, (seed, number)),
            "categories": [
                {"id": number, "name": name}
                for number, name in enumerate(SYNTHETIC_CLASSES, start=1)
            ],
        }
        (partial / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
    (partial / _MARKER).write_text(json.dumps(arguments) + "\n", encoding="utf-8")
    shutil.rmtree(out_dir, ignore_errors=True)
    partial.rename(out_dir)
    return out_dir


def render(
    rng: np.random.Generator, image_size: tuple[int, int] = (160, 160)
) -> tuple[np.ndarray, list[dict]]:
    """Draws one image, (height, width, 3) uint8, and gives its COCO annotations without ids."""
    height, width = image_size
    fine_size = (height * _FINE, width * _FINE)
    canvas = _background(rng, fine_size)
    free = np.ones(fine_size, bool)
    annotations = []
    for _ in range(int(rng.integers(3, 7))):
        for _attempt in range(10):
            category = int(rng.integers(len(SYNTHETIC_CLASSES)))
            outline = _place(rng, _OUTLINES[SYNTHETIC_CLASSES[category]], fine_size)
            mask = np.zeros(fine_size, np.uint8)
            cv2.fillPoly(mask, [np.round(outline).astype(np.int32)], 1)
            inside = mask.sum() >= _MIN_INSIDE * cv2.contourArea(outline.astype(np.float32))
            if inside and free[mask > 0].all():
                free[mask > 0] = False
                _paint(rng, canvas, mask > 0, category)
                annotations.append(_annotation(mask, category))
                break
    image = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    noisy = image + rng.normal(0, rng.uniform(1, 5), image.shape)
    return np.clip(np.round(noisy), 0, 255).astype(np.uint8), annotations


# ---- writing ----


def _write_images(
    folder: Path, count: int, image_size: tuple[int, int], seed: tuple[int, int]
) -> dict[str, list]:
    """Draws the images of a split; returns "images" and "annotations" of its COCO file."""
    folder.mkdir()
    images, annotations = [], []
    for number in range(count):
        image, objects = render(np.random.default_rng([*seed, number]), image_size)
        file_name = f"{number:06d}.jpg"
        encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
        (folder / file_name).write_bytes(encoded.tobytes())
        size = {"height": image_size[0], "width": image_size[1]}
        images.append({"id": number + 1, "file_name": file_name, **size})
        for annotation in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": number + 1, **annotation})
    return {"images": images, "annotations": annotations}


def _annotation(visible: np.ndarray, category: int) -> dict:
    """Traces a fine mask of one object."""
    # OpenCV joins the border pixels' indices. A pixel more to the right and below makes these the
    # coordinates of the pixels' outer edges, so that no half pixel is lost on any side.
    padded = np.pad(visible.astype(np.uint8), ((0, 1), (0, 1)))
    grown = cv2.dilate(padded, np.ones((2, 2), np.uint8), anchor=(1, 1))
    contours, _ = cv2.findContours(grown, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    simple = [cv2.approxPolyDP(contour, 1.0, True)[:, 0] for contour in contours]
    simple = [contour for contour in simple if len(contour) >= 3]
    # Slivers of less than a pixel are left out, unless nothing else is there.
    large = [contour for contour in simple if cv2.contourArea(contour) >= _FINE**2]
    polygons = [contour / _FINE for contour in large or simple]
    points = np.concatenate(polygons)
    corner, extent = points.min(axis=0), np.ptp(points, axis=0)
    # All are multiples of a quarter of a pixel; a little noise of floats is rounded away.
    return {
        "category_id": category + 1,
        "bbox": np.concatenate([corner, extent]).round(2).tolist(),
        "area": round(sum(cv2.contourArea(polygon.astype(np.float32)) for polygon in polygons), 2),
        "segmentation": [polygon.ravel().round(2).tolist() for polygon in polygons],
        "iscrowd": 0,
    }


# ---- drawing ----


def _regular(corners: int) -> np.ndarray:
    angles = np.arange(corners) * 2 * np.pi / corners
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


# (P, 2) outlines of radius 1 around the origin.
_OUTLINES = {
    "disc": _regular(64),
    "square": _regular(4),
    "triangle": _regular(3),
    "star": _regular(10) * np.tile([[1.0], [0.5]], (5, 1)),
}


def _place(rng: np.random.Generator, outline: np.ndarray, fine_size: tuple[int, int]) -> np.ndarray:
    """Turns, stretches and moves an outline at random, into pixels of the drawing."""
    radius = min(fine_size) * np.exp(rng.uniform(*np.log(_RADII)))
    angle = rng.uniform(0, 2 * np.pi)
    stretch = np.diag([1.0, rng.uniform(0.75, 1.0)])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return outline @ (radius * stretch @ turn) + rng.uniform(0, 1, 2) * fine_size[::-1]


def _background(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A soft greyish field with a few lines that belong to no class."""
    grid = rng.uniform(-20, 20, (6, 6, 3)).astype(np.float32)
    field = rng.uniform(60, 200) + cv2.resize(grid, size[::-1], interpolation=cv2.INTER_LINEAR)
    canvas = np.clip(field, 0, 255).astype(np.uint8)
    for _ in range(int(rng.integers(0, 4))):
        start, end = (rng.uniform(0, 1, (2, 2)) * size[::-1]).astype(int).tolist()
        grey = [float(rng.uniform(20, 235))] * 3
        cv2.line(canvas, start, end, grey, int(rng.integers(1, 3)) * _FINE, cv2.LINE_AA)
    return canvas


def _paint(rng: np.random.Generator, canvas: np.ndarray, mask: np.ndarray, category: int) -> None:
    """Paints one object in a colour around its class's hue, in place."""
    hue = (category / len(SYNTHETIC_CLASSES) * 180 + rng.normal(0, _HUE_SPREAD)) % 180
    hsv = np.array([[[hue, rng.uniform(120, 255), rng.uniform(90, 255)]]]).astype(np.uint8)
    canvas[mask] = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0]
