#!/usr/bin/env python
"""Trains and evaluates a (distilled) Detectron2 model that is written as a LazyConfig.

tools/lazyconfig_train_net.py --config-file lazy/ckd_reviewkd_rcnn_r101_r18.py [key=value ...]
"""

import sys

from kd_detectron.engine.lazy import main

if __name__ == "__main__":
    sys.exit(main())
