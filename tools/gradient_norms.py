#!/usr/bin/env python
"""How hard each distillation loss pulls at the student, against the detection losses.

tools/gradient_norms.py --config-file NAME [MODEL.WEIGHTS RUN/model_final.pth]
"""

import sys

from kd_detectron.profiling.gradient_norms import main

if __name__ == "__main__":
    sys.exit(main())
