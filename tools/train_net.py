#!/usr/bin/env python
"""Trains and evaluates a (distilled) Detectron2 model.

tools/train_net.py --config-file ckd_rcnn_r101_r18.yaml [--num-gpus N] [KEY VALUE ...]
"""

import sys

from kd_detectron.engine.main import main

if __name__ == "__main__":
    sys.exit(main())
