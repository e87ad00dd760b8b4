"""How good attributions are: counterfactual correlation, calibration of error bars, comparisons.

May import: `estimators`, `attributions`, `metrics`. Start reading in `evaluate.py`.
"""
