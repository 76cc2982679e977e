#!/usr/bin/env python
"""Export a run's student: for plain Detectron2, as TorchScript or as ONNX.

python tools/export_student.py output/ckd_rcnn_r101_r18 exported
python tools/export_student.py output/ckd_rcnn_r101_r18 exported --format onnx --image a.jpg
"""

import sys

from kd_detectron.checkpoint.export_command import main

if __name__ == "__main__":
    sys.exit(main())
