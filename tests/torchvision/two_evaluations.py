"""One of several processes: evaluates its share of five images, writes the results to a file.

Run by ``test_evaluation.py`` as ``two_evaluations.py FOLDER RANK WORLD_SIZE``; Lightning reads the
rest from the environment.
"""

import json
import os
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from run_folders_torchvision import options

from kd_detectron.torchvision.data import DetectionData
from kd_detectron.torchvision.training import DetectionModule, build_trainer

IMAGES, SIZE = 5, 64


def write_data(folder: Path) -> None:
    """Images of one grey each, with two objects of their own."""
    (folder / "val").mkdir()
    images, annotations = [], []
    for number in range(IMAGES):
        Image.new("RGB", (SIZE, SIZE), (10 * number,) * 3).save(folder / "val" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": SIZE, "height": SIZE})
        for x in (4 + number, 30 + 2 * number):
            box = [x, 10, 20, 20 + number]
            right, bottom = x + box[2], 10 + box[3]
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": number,
                    "category_id": len(annotations) % 2,
                    "bbox": box,
                    "segmentation": [[x, 10, right, 10, right, bottom, x, bottom]],
                }
            )
    names = [{"id": 0, "name": "even"}, {"id": 1, "name": "odd"}]
    content = {"images": images, "annotations": annotations, "categories": names}
    for split in ("train", "val"):
        (folder / f"{split}.json").write_text(json.dumps(content))


class NearlyRight(torch.nn.Module):
    """Finds the objects of ``write_data`` some pixels aside, with scores of their own."""

    def forward(self, images, targets=None):
        found = []
        for image in images:
            number = round(image[0, 0, 0].item() * 255) // 10
            random = torch.Generator().manual_seed(number)
            x = torch.tensor([4.0 + number, 30.0 + 2 * number])
            y = torch.full((2,), 10.0)
            boxes = torch.stack([x, y, x + 20, y + 20 + number], 1)
            boxes = boxes + torch.randint(-3, 4, (2, 4), generator=random)
            masks = torch.zeros(2, 1, SIZE, SIZE)
            for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
                mask[0, y0:y1, x0:x1] = 1
            scores = torch.rand(2, generator=random)
            found.append(
                {"boxes": boxes, "labels": torch.tensor([1, 2]), "scores": scores, "masks": masks}
            )
        return found


def evaluate(folder: Path, processes: int) -> dict:
    """AP of boxes and masks, as this process has it."""
    os.cpu_count = lambda: 2  # Lightning starts none here.
    of_masks = options(
        folder,
        folder / "run",
        student="maskrcnn_resnet18_fpn",
        accelerator="cpu",
        devices=str(processes),
    )
    val = DetectionData(*of_masks.val, training=False, masks=True)
    module = DetectionModule(NearlyRight(), of_masks, val, val)
    build_trainer(of_masks, []).validate(module, verbose=False)
    return module.results


def main(folder, rank, world_size):
    results = evaluate(Path(folder), int(world_size))
    Path(folder, f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
