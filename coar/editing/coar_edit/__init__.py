"""COAR-Edit: components ranked by attributions, as many ablated as validation or targets want.

May import: `attributions`, `edits`. Start reading in `ranking.py`.
"""
