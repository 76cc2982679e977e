#!/usr/bin/env python
"""Pictures of runs: each subcommand (ap, curves, predictions, cam, features, logits) writes one.

python tools/visualize.py predictions output/baseline_rcnn_r18 output/ckd_rcnn_r101_r18
"""

import sys

from kd_detectron.visualize.main import main

if __name__ == "__main__":
    sys.exit(main())
