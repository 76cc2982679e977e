#!/usr/bin/env python
"""A teacher labels images that nobody has labelled, into a COCO-format file to train on.

tools/label_images.py --config-file bccd/ckd_reviewkd_r18.yaml --images FOLDER --output FILE
"""

import sys

from kd_detectron.labelling.main import main

if __name__ == "__main__":
    sys.exit(main())
