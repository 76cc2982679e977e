"""Measurements: what a distilled step costs, and how hard each loss pulls on the student."""
