#!/usr/bin/env python
"""The demo: synthetic data, a teacher, the baseline, the student distilled and by the recipe.

tools/demo.py [--output output/demo]

Stopped at any moment, the same command continues.
"""

import sys

from kd_detectron.studies.demo import main

if __name__ == "__main__":
    sys.exit(main())
