"""Attributions that others use, to compare with: random weights, gates, leave-one-out, input paths.

May import: `abstract.py` and `plain.py` beside it. Start reading in `gates.py`; copy `leave_one_out.py` for a new
one.
"""
