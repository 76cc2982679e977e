#!/usr/bin/env python
"""What the principal components of the teacher's maps carry, and a student's error in each.

tools/principal_components.py [--student RUN/model_final.pth] --config-file NAME
"""

import sys

from kd_detectron.profiling.principal_components import main

if __name__ == "__main__":
    sys.exit(main())
