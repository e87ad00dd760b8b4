"""Attributions from a campaign by linear regression, in blocks, exactly.

May import: `estimators` beside it, `attributions`. Start reading in `fit.py`.
"""
