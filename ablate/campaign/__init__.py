"""Campaigns: what a spec says, what a store is bound to, and the run that fills it.

May import: everything in `ablate` below it, not `workers`. Start reading in `run.py`; settings of a spec are in
`spec.py`.
"""
