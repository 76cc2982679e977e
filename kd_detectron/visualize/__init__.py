"""Pictures: training curves and AP of runs; detections, features and logits of trained models.

The command is ``tools/visualize.py``.
"""
