"""Attributions that others use, to compare with: random weights, gates, leave-one-out, input paths.

May import: `estimators` beside it. Start reading in `gates.py`; copy `random_weights.py` for a new one.
"""
