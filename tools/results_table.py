#!/usr/bin/env python
"""Compares runs: AP, gain over the baseline, share of the teacher's gap, published numbers.

python tools/results_table.py output/baseline_rcnn_r18 output/ckd_rcnn_r101_r18 --teacher t.json
"""

import sys

from kd_detectron.runs.main import main

if __name__ == "__main__":
    sys.exit(main())
