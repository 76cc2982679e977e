"""A small synthetic detection dataset in COCO format, made in seconds, the same for the same seed.

For the demo and for trying things without downloading: textured backgrounds with clutter, on them
overlapping shapes of eight classes, from a sixth of the image to over half of it, with masks and
boxes of their visible parts. Made so that a network learns something in minutes and a better one
does better: a class prefers a hue, but the hues of neighbouring classes overlap, and those are the
pairs that share an outline or nearly so (disc and target, square and window, triangle and kite,
star and cross); what tells them apart is a detail that blur, noise and occlusion eat away at small
sizes.

Shapes are drawn at four times the size and averaged down; masks are traced at that fine size, so
that polygons fit to about a quarter of a pixel. Every image has its own random stream, (seed,
split, number), so that a larger set begins with the images of the smaller one.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from kd_detectron.errors import ConfigError

SYNTHETIC_CLASSES = ("disc", "target", "square", "window", "triangle", "kite", "star", "cross")

# Pixels of the drawing per pixel of the image, in each direction.
_FINE = 4
# An object must keep this part of its area visible, or it is placed elsewhere.
_MIN_VISIBLE = 0.35
# Standard deviation of an object's hue around its class's, of 180; the classes are 22.5 apart.
_HUE_SPREAD = 7
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
        seed: any non-negative integer; the same seed gives byte-identical annotation files.

    Returns:
        ``out_dir`` as a path.

    Raises:
        ConfigError: a number is out of range, or ``out_dir`` holds something else.
    """
    out_dir = Path(out_dir)
    if num_train < 1 or num_val < 1 or seed < 0 or min(image_size) < 32:
        raise ConfigError(
            f"a synthetic dataset needs at least one image in each split, a seed of at least 0 and"
            f" images of at least 32 pixels, not num_train {num_train}, num_val {num_val}, seed"
            f" {seed}, image_size {tuple(image_size)}"
        )
    splits = {"train": num_train, "val": num_val}
    arguments = {**splits, "image_size": list(image_size), "seed": seed, "version": 2}
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
        _write_split(partial, split, count, image_size, (seed, number), arguments)
    (partial / _MARKER).write_text(json.dumps(arguments) + "\n", encoding="utf-8")
    shutil.rmtree(out_dir, ignore_errors=True)
    partial.rename(out_dir)
    return out_dir


def render(
    rng: np.random.Generator, image_size: tuple[int, int] = (160, 160)
) -> tuple[np.ndarray, list[dict]]:
    """Draws one image.

    Args:
        rng: the source of everything random in it.
        image_size: height and width in pixels.

    Returns:
        The image, (height, width, 3) uint8, and its annotations as in a COCO file without ids:
        "category_id" (from 1), "bbox" (x, y, width, height), "area", "segmentation" (polygons),
        "iscrowd".
    """
    height, width = image_size
    fine_size = (height * _FINE, width * _FINE)
    canvas = _background(rng, fine_size)
    _draw_clutter(rng, canvas, count=int(rng.integers(2, 7)))

    owners = np.zeros(fine_size, np.uint8)  # 0 background, otherwise number of the object on top
    objects: list[tuple[int, float]] = []  # category index and whole area of each object
    for _ in range(int(rng.integers(2, 6))):
        for _attempt in range(10):
            category = int(rng.integers(len(SYNTHETIC_CLASSES)))
            outline, details = _shape(rng, SYNTHETIC_CLASSES[category], fine_size)
            mask = np.zeros(fine_size, np.uint8)
            cv2.fillPoly(mask, [np.round(outline).astype(np.int32)], 1)
            covered = np.where(mask, len(objects) + 1, owners).astype(np.uint8)
            area = float(cv2.contourArea(outline.astype(np.float32)))
            if _all_visible(covered, [*objects, (category, area)]):
                owners = covered
                objects.append((category, area))
                _paint(rng, canvas, mask, outline, details, category)
                break
    _draw_clutter(rng, canvas, count=int(rng.integers(0, 3)), thin=True)

    image = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    annotations = [
        _annotation(owners == number, category)
        for number, (category, _) in enumerate(objects, start=1)
    ]
    return _photograph(rng, image), annotations


# ---- writing ----


def _write_split(
    out_dir: Path,
    split: str,
    count: int,
    image_size: tuple[int, int],
    seed: tuple[int, int],
    arguments: dict,
) -> None:
    (out_dir / split).mkdir()
    images, annotations = [], []
    for number in range(count):
        image, objects = render(np.random.default_rng([*seed, number]), image_size)
        file_name = f"{number:06d}.jpg"
        encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
        (out_dir / split / file_name).write_bytes(encoded.tobytes())
        size = {"height": image_size[0], "width": image_size[1]}
        images.append({"id": number + 1, "file_name": file_name, **size})
        for annotation in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": number + 1, **annotation})
    content = {
        "info": {"description": "kd_detectron synthetic shapes", **arguments},
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": number, "name": name} for number, name in enumerate(SYNTHETIC_CLASSES, start=1)
        ],
    }
    (out_dir / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")


def _annotation(visible: np.ndarray, category: int) -> dict:
    polygons = _polygons(visible)
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


def _polygons(visible: np.ndarray) -> list[np.ndarray]:
    """Traces a fine mask; returns (P, 2) outlines in pixels of the image."""
    # OpenCV joins the border pixels' indices. A pixel more to the right and below makes these the
    # coordinates of the pixels' outer edges, so that no half pixel is lost on any side.
    padded = np.pad(visible.astype(np.uint8), ((0, 1), (0, 1)))
    grown = cv2.dilate(padded, np.ones((2, 2), np.uint8), anchor=(1, 1))
    contours, _ = cv2.findContours(grown, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    simple = [cv2.approxPolyDP(contour, 1.0, True)[:, 0] for contour in contours]
    simple = [contour for contour in simple if len(contour) >= 3]
    # Slivers of less than a pixel are left out, unless nothing else is there.
    large = [contour for contour in simple if cv2.contourArea(contour) >= _FINE**2]
    return [contour / _FINE for contour in large or simple]


def _all_visible(owners: np.ndarray, objects: list[tuple[int, float]]) -> bool:
    """Whether every object is visible enough, without holes that a polygon cannot show."""
    areas = np.bincount(owners.ravel(), minlength=len(objects) + 1)
    for number, (_, area) in enumerate(objects, start=1):
        if areas[number] < max(_MIN_VISIBLE * area, (4 * _FINE) ** 2):
            return False
        _, hierarchy = cv2.findContours(
            (owners == number).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE
        )
        if (hierarchy[0, :, 3] >= 0).any():
            return False
    return True


# ---- shapes ----


def _shape(
    rng: np.random.Generator, name: str, fine_size: tuple[int, int]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns the (P, 2) outline of a random object of a class and the polygons of its details."""
    outline, details = _SHAPES[name](rng)
    side = min(fine_size)
    radius = side * np.exp(rng.uniform(np.log(0.08), np.log(0.30)))
    angle = rng.uniform(0, 2 * np.pi)
    stretch = np.diag([1.0, rng.uniform(0.75, 1.0)])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = rng.uniform(0, 1, 2) * fine_size[::-1]

    def place(points: np.ndarray) -> np.ndarray:
        return points @ (radius * stretch @ turn) + centre

    return place(outline), [place(detail) for detail in details]


def _regular(corners: int, radius: float = 1.0) -> np.ndarray:
    angles = np.arange(corners) * 2 * np.pi / corners
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _rectangle(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])


def _target(rng):
    outer = rng.uniform(0.6, 0.75)
    # One polygon: round the outside, back round the inside, each closed.
    closed = np.concatenate([_regular(64), _regular(1)])
    return _regular(64), [np.concatenate([outer * closed, (outer - 0.3) * closed[::-1]])]


def _window(rng):
    half = rng.uniform(0.1, 0.16)
    bars = [_rectangle(-0.8, -half, 0.8, half), _rectangle(-half, -0.8, half, 0.8)]
    return _rectangle(-0.8, -0.8, 0.8, 0.8), bars


def _kite(rng):
    # A triangle with its base pushed in: an arrow head.
    notch = np.array([[rng.uniform(-0.05, 0.1), 0.0]])
    corners = _regular(3)
    return np.concatenate([corners[:2], notch, corners[2:]]), []


def _star(rng):
    points = _regular(10)
    points[1::2] *= rng.uniform(0.42, 0.55)
    return points, []


def _cross(rng):
    half = rng.uniform(0.25, 0.35)
    quarter = np.array([[1.0, -half], [1.0, half], [half, half]])
    turns = [np.array([[0, 1], [-1, 0]]), np.array([[-1, 0], [0, -1]]), np.array([[0, -1], [1, 0]])]
    return np.concatenate([quarter, *[quarter @ turn for turn in turns]]), []


_SHAPES: dict[str, Callable] = {
    "disc": lambda rng: (_regular(64), []),
    "target": _target,
    "square": lambda rng: (_rectangle(-0.8, -0.8, 0.8, 0.8), []),
    "window": _window,
    "triangle": lambda rng: (_regular(3), []),
    "kite": _kite,
    "star": _star,
    "cross": _cross,
}


# ---- painting ----


def _colour(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(15, 240, 3)


def _class_colour(rng: np.random.Generator, category: int) -> np.ndarray:
    """A colour around the hue that a class prefers; neighbouring classes overlap."""
    hue = (category / len(SYNTHETIC_CLASSES) * 180 + rng.normal(0, _HUE_SPREAD)) % 180
    hsv = np.array([[[hue, rng.uniform(90, 255), rng.uniform(70, 255)]]]).astype(np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0].astype(float)


def _colour_unlike(
    draw: Callable[[], np.ndarray], other: np.ndarray, distance: float
) -> np.ndarray:
    for _ in range(50):
        colour = draw()
        if np.abs(colour - other).sum() >= distance:
            return colour
    return colour


def _smooth_noise(rng: np.random.Generator, size: tuple[int, int], cells: int) -> np.ndarray:
    """A (height, width, 3) float32 field that varies over about 1/cells of the image."""
    grid = rng.uniform(-1, 1, (cells, cells, 3)).astype(np.float32)
    return cv2.resize(grid, size[::-1], interpolation=cv2.INTER_LINEAR)


def _stripes(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A (height, width, 1) float32 field of parallel waves."""
    angle, period = rng.uniform(0, np.pi), rng.uniform(4, 24) * _FINE
    x = np.arange(size[1], dtype=np.float32)[None] * np.float32(np.cos(angle))
    y = np.arange(size[0], dtype=np.float32)[:, None] * np.float32(np.sin(angle))
    return np.sin((x + y) * np.float32(2 * np.pi / period))[..., None]


def _texture(rng: np.random.Generator, size: tuple[int, int], strength: float) -> np.ndarray:
    field = strength * rng.uniform(0.2, 1) * _smooth_noise(rng, size, int(rng.integers(3, 12)))
    if rng.random() < 0.4:
        field = field + strength * rng.uniform(0.2, 0.7) * _stripes(rng, size)
    return field


def _background(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    canvas = _colour(rng) + _texture(rng, size, 60) + 15 * _smooth_noise(rng, size, 40)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def _draw_clutter(
    rng: np.random.Generator, canvas: np.ndarray, *, count: int, thin: bool = False
) -> None:
    """Draws lines, arcs and irregular blobs that belong to no class, in place."""
    height, width = canvas.shape[:2]
    for _ in range(count):
        colour = tuple(_colour(rng).tolist())
        thickness = int(rng.integers(1, 3 if thin else 8)) * _FINE // 2 + 1
        ends = (rng.uniform(0, 1, (4, 2)) * (width, height)).astype(int)
        kind = rng.integers(2 if thin else 3)
        if kind == 0:
            cv2.line(canvas, ends[0].tolist(), ends[1].tolist(), colour, thickness, cv2.LINE_AA)
        elif kind == 1:
            axes = rng.integers(height // 20, height // 4, 2).tolist()
            start = float(rng.uniform(0, 360))
            cv2.ellipse(
                canvas, ends[0].tolist(), axes, start, 0, float(rng.uniform(40, 200)), colour,
                thickness, cv2.LINE_AA,
            )  # fmt: skip
        else:
            radii = height * rng.uniform(0.02, 0.12) * rng.uniform(0.4, 1.3, 9)
            blob = ends[0] + _regular(9) * radii[:, None]
            cv2.fillPoly(canvas, [blob.astype(np.int32)], colour, cv2.LINE_AA)


def _paint(
    rng: np.random.Generator,
    canvas: np.ndarray,
    mask: np.ndarray,
    outline: np.ndarray,
    details: list[np.ndarray],
    category: int,
) -> None:
    """Paints one object on the canvas, in place."""
    x, y, width, height = cv2.boundingRect(mask)
    window = canvas[y : y + height, x : x + width]
    inside = mask[y : y + height, x : x + width] > 0

    def polygon(points: np.ndarray) -> list[np.ndarray]:
        return [np.round(points - (x, y)).astype(np.int32)]

    background = window[inside].mean(axis=0)
    colour = _colour_unlike(lambda: _class_colour(rng, category), background, 110)
    fill = np.clip(colour + _texture(rng, (height, width), 35), 0, 255).astype(np.uint8)
    detail_colour = _colour_unlike(lambda: _colour(rng), colour, 130).tolist()
    for detail in details:
        cv2.fillPoly(fill, polygon(detail), detail_colour)
    if rng.random() < 0.3:
        cv2.polylines(fill, polygon(outline), True, _colour(rng).tolist(), _FINE * 2)
    window[inside] = fill[inside]


def _photograph(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Blur, exposure and noise of a poor camera."""
    blurred = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.2, 1.1))).astype(np.float32)
    exposed = (blurred - 128) * rng.uniform(0.7, 1.1) + 128 + rng.uniform(-20, 20)
    noisy = exposed + rng.normal(0, rng.uniform(2, 14), image.shape)
    return np.clip(np.round(noisy), 0, 255).astype(np.uint8)
