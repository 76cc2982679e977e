"""The half precisions that ``SOLVER.AMP.PRECISION`` names."""

import torch

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}
