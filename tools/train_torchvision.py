#!/usr/bin/env python
"""Trains a torchvision detector on COCO-format data, distilled or not.

    python tools/train_torchvision.py --train train.json train --val val.json val \\
        --student fasterrcnn_mobilenet_v3_large_320_fpn --teacher-run output/teacher \\
        --distillers CKD=0.1 ReviewKD --output output/ckd_reviewkd
"""

import sys

from kd_detectron.torchvision.main import main

if __name__ == "__main__":
    sys.exit(main())
