"""Estimators: from a campaign, or from a model, to one linear attribution per example.

May import: `attributions`, `judging`, `metrics` and the root's basics. Start reading in `abstract.py`; a new
estimator goes into `baselines/` or `gradient/` and gets a line in `registry.py`.
"""
