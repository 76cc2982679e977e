"""Studies: lists of runs from one file, run, compared and reported together."""
