"""What a run folder (Detectron2's ``OUTPUT_DIR``) holds, and tables that compare several.

Files only: works where Detectron2 is not installed. The command is ``tools/results_table.py``.
"""
