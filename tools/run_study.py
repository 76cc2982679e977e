#!/usr/bin/env python
"""Runs the trainings of a study file, skipping finished ones, and compares them.

tools/run_study.py bccd.yaml [--output FOLDER]
"""

import sys

from kd_detectron.studies.study import main

if __name__ == "__main__":
    sys.exit(main())
