"""Attributions from gate gradients: designs, moments, shrinkage.

May import: `abstract.py`, `plain.py` and `storing.py` beside it. Start reading in `estimator.py`.
"""
