"""How good attributions are: counterfactual correlation, calibration of error bars, comparisons.

May import: `attributions`, `metrics` and the root's basics. Start reading in `evaluate.py`.
"""
