"""Attributions from a campaign by linear regression, in blocks, exactly.

May import: `abstract.py`, `plain.py` and `storing.py` beside it, `attributions`, `judging`. Start reading in
`fit.py`.
"""
