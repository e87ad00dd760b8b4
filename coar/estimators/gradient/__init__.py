"""Attributions from gate gradients: designs, moments, shrinkage.

May import: `estimators` beside it. Start reading in `estimator.py`.
"""
