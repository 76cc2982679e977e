"""A trained teacher labels images that nobody has labelled: ``labels.py``, and its command."""
