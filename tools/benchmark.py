#!/usr/bin/env python
"""What a distilled step costs against its parts: times, ratios and peak memory.

python tools/benchmark.py --config-file ckd_rcnn_r101_r18.yaml --output ckd.json
"""

import sys

from kd_detectron.profiling.command import main

if __name__ == "__main__":
    sys.exit(main())
