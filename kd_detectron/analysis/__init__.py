"""What was learnt from the runs: result tables, training curves and pictures.

``runs`` reads a run folder (Detectron2's ``OUTPUT_DIR``), ``tables`` and ``curves`` compare them,
``predictions``, ``cams``, ``features`` and ``logits`` show what the trained models do on images.
``runs``, ``tables`` and ``curves`` read files only: they work where Detectron2 is not installed.
The commands are ``tools/results_table.py`` and ``tools/visualize.py``.
"""
