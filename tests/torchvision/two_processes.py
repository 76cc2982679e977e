"""One of several processes: one distilled step on its own image, gradients written to a file.

Run by ``test_distributed.py`` as ``two_processes.py OUTPUT RANK WORLD_SIZE``.
"""

import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_torchvision import batch, detector

from kd_detectron.torchvision import DistilledDetector

AVERAGES = {"ReviewKD": 1e-3, "KD": 1.0, "FitNet": 1e-3}


def images_and_targets():
    return batch(sizes=((64, 96), (64, 96)), boxes_per_image=(2, 2))


def built() -> DistilledDetector:
    """Nothing left to chance, nothing that depends on the batch: running statistics."""
    options = {
        "rpn_batch_size_per_image": 100_000,
        "rpn_positive_fraction": 1.0,
        "rpn_post_nms_top_n_train": 12,
        "box_batch_size_per_image": 4096,
        "box_positive_fraction": 1.0,
    }
    student = detector("faster", seed=1, **options)
    model = DistilledDetector(student, detector("faster", seed=2), AVERAGES).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return model


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def main(output, rank, world_size):
    rank, world_size = int(rank), int(world_size)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{output}/store", rank=rank, world_size=world_size
    )
    model = built()
    mark = next(model.teacher.model.parameters())
    mark.data += rank  # Were the teacher broadcast, both would have the first process's.
    images, targets = images_and_targets()
    distributed = DistributedDataParallel(model)
    losses = distributed(images[rank : rank + 1], targets[rank : rank + 1])
    mark.data -= rank
    sum(losses.values()).backward()
    torch.save({"gradients": gradients(model), "mark": mark.clone()}, f"{output}/{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
