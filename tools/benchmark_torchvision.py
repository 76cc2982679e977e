#!/usr/bin/env python
"""What a distilled step on torchvision's detectors costs against its parts: times and ratios.

python tools/benchmark_torchvision.py --config configs/torchvision/bccd_recipe.yaml \
    --teacher fasterrcnn_resnet34_fpn --images 4 --size 200 266 --classes 3
"""

import sys

from kd_detectron.torchvision.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
