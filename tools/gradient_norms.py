#!/usr/bin/env python
"""Gradient norms of each distillation loss, compared with those of the detection losses.

tools/gradient_norms.py --config-file NAME [MODEL.WEIGHTS RUN/model_final.pth]
"""

import sys

from kd_detectron.profiling.gradient_norms import main

if __name__ == "__main__":
    sys.exit(main())
