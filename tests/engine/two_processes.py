"""One of several processes: one distilled step on its own image, gradients written to a file.

Run by ``test_distributed.py`` as ``two_processes.py CONFIG BATCH OUTPUT RANK WORLD_SIZE``. The file
OUTPUT/RANK.pt says what was exchanged and what the gradients are.
"""

import sys

import torch
from detectron2.engine import create_ddp_model
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from kd_detectron import get_config


def make_comparable(model) -> None:
    """ReviewKD's normalisation by running statistics; activations that do not grow with depth.

    With the identity as frozen normalisation a random ResNet's features are so large that sigmoids
    saturate and rounding alone decides about their gradients.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
        elif isinstance(module, FrozenBatchNorm2d):
            module.weight.fill_(0.3)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def main(config, batch, output, rank, world_size):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{output}/store", rank=int(rank), world_size=int(world_size)
    )
    comm.create_local_process_group(int(world_size))
    torch.manual_seed(0)
    model = build_model(get_config(config))
    # Were the teacher broadcast, this mark would become that of the first process.
    model.teacher.model.register_buffer("mark", torch.tensor([float(rank)]))
    before = model.teacher.fingerprint()
    make_comparable(model)
    distributed = create_ddp_model(model, device_ids=None, broadcast_buffers=False)
    exchanged = []

    def count(group, bucket):
        exchanged.append(bucket.buffer().numel())
        return allreduce_hook(group, bucket)

    distributed.register_comm_hook(None, count)
    with EventStorage():
        losses = distributed([torch.load(batch, weights_only=False)[int(rank)]])
        sum(losses.values()).backward()
    result = {
        "gradients": gradients(model),
        "exchanged": sum(exchanged),
        "teacher": [before, model.teacher.fingerprint()],
        "mark": model.teacher.model.mark.item(),
    }
    torch.save(result, f"{output}/{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
