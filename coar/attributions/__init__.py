"""Attributions as users ask them: opening, tables, nearest examples, and the way back to model and data.

May import: `metrics` and the root's basics. Start reading in `attributions.py`.
"""
