#!/usr/bin/env python
"""Does everything work on this GPU, and what does it cost? About ten minutes on one GPU.

tools/gpu_report.py --output gpu_report.json
"""

import sys

from kd_detectron.profiling.gpu_command import main

if __name__ == "__main__":
    sys.exit(main())
