"""Measures what a distilled step costs, compared with the parts that it consists of.

The parts and the ratios are those of ``timing.py``. Weights are random and no optimizer step is
taken, so every round does the same arithmetic. On a GPU, peak memory of both steps is measured too.

``tools/benchmark.py`` prints the report and writes it as JSON; ``docs/performance.md`` holds the
numbers. Legend: N images.
"""

import gc

import detectron2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage

from kd_detectron.errors import ConfigError
from kd_detectron.modeling.autocast import prepare_for_autocast
from kd_detectron.precision import PRECISIONS

from .timing import DISTILLED, SEED, STUDENT, measure, random_boxes


def synthetic_batch(cfg: CfgNode, *, images: int, size: tuple[int, int]) -> list[dict]:
    """N Detectron2 training inputs of noise, of a height and width; the same each time."""
    random = np.random.default_rng(SEED)
    height, width = size
    batch = []
    for index in range(images):
        annotations = []
        for x0, y0, x1, y1 in random_boxes(random, size):
            category = int(random.integers(cfg.MODEL.ROI_HEADS.NUM_CLASSES))
            annotations.append(
                {
                    "bbox": [x0, y0, x1, y1],
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "category_id": category,
                }
            )
            if cfg.MODEL.MASK_ON:
                annotations[-1]["segmentation"] = [[x0, y0, x1, y0, x1, y1, x0, y1]]
        image = random.integers(256, size=(3, height, width), dtype=np.uint8)
        batch.append(
            {
                "file_name": f"synthetic_{index}",
                "image": torch.from_numpy(image),
                "instances": annotations_to_instances(annotations, size, cfg.INPUT.MASK_FORMAT),
                "height": height,
                "width": width,
            }
        )
    return batch


class Step:
    """Forward and backward of a model on one batch, as the trainer runs them.

    The sampled proposals are the same each time, since the random state is.
    """

    def __init__(self, cfg: CfgNode, batch: list[dict], *, distilled: bool):
        cfg = cfg.clone()
        cfg.defrost()
        cfg.KD.ENABLED = distilled
        torch.manual_seed(SEED)
        self.model = build_model(cfg).train()
        if cfg.SOLVER.AMP.ENABLED:  # As the trainer does.
            prepare_for_autocast(self.model)
        self._batch = batch
        self._autocast = autocast_options(cfg)

    def __call__(self) -> None:
        self.model.zero_grad()
        torch.manual_seed(SEED)
        with EventStorage(), torch.autocast(**self._autocast):
            losses = self.model(self._batch)
        sum(losses.values()).backward()


def autocast_options(cfg: CfgNode) -> dict:
    """The arguments of ``torch.autocast`` that ``SOLVER.AMP`` asks for."""
    return {
        "device_type": cfg.MODEL.DEVICE.split(":")[0],
        "dtype": PRECISIONS[cfg.SOLVER.AMP.PRECISION],
        "enabled": cfg.SOLVER.AMP.ENABLED,
    }


def run_benchmark(
    cfg: CfgNode,
    *,
    name: str,
    images: int = 2,
    size: tuple[int, int] = (480, 640),
    repeats: int = 5,
) -> dict:
    """Measures one distilled config on N images of a height and width; loads no weights.

    Returns:
        The report, plain data, as it is written to JSON.
    """
    if not (cfg.KD.ENABLED and cfg.KD.DISTILLERS):
        raise ConfigError(
            f"KD.DISTILLERS of '{name}' is {list(cfg.KD.DISTILLERS)} and KD.ENABLED is "
            f"{cfg.KD.ENABLED}: nothing is distilled, so there is nothing to compare"
        )
    batch = synthetic_batch(cfg, images=images, size=size)
    student, distilled = (Step(cfg, batch, distilled=one) for one in (False, True))
    report = {"name": name} | measure(
        student,
        distilled,
        autocast=autocast_options(cfg),
        repeats=repeats,
        device=cfg.MODEL.DEVICE,
    )
    report["batch"] = {
        "images": images,
        "height": size[0],
        "width": size[1],
        "proposals": report.pop("proposals"),
    }
    report["amp"] = cfg.SOLVER.AMP.PRECISION if cfg.SOLVER.AMP.ENABLED else ""
    report["machine"]["detectron2"] = detectron2.__version__
    report["memory"] = {}
    if cfg.MODEL.DEVICE.startswith("cuda"):
        del student, distilled
        free_memory()
        report["memory"] = peak_memory(cfg, batch)
    return report


def free_memory() -> None:
    """Frees what nothing refers to any more, on the GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory(cfg: CfgNode, batch: list[dict]) -> dict[str, int]:
    """Peak bytes that tensors take on the GPU in the student's and in the distilled step."""
    peaks = {}
    for name in (STUDENT, DISTILLED):
        step = Step(cfg, batch, distilled=name == DISTILLED)
        torch.cuda.reset_peak_memory_stats(cfg.MODEL.DEVICE)
        # The second step meets the first one's gradients.
        step()
        step()
        peaks[name] = torch.cuda.max_memory_allocated(cfg.MODEL.DEVICE)
        del step
        free_memory()
    return peaks
