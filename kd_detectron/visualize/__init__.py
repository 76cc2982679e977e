"""Pictures: training curves and AP of runs; detections and features of trained models.

The command is ``tools/visualize.py``.
"""
