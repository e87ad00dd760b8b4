"""COAR-Edit: components ranked by attributions, as many ablated as validation or targets want.

May import: everything in `editing` below it, `attributions`, `estimators`, `metrics`. Start reading in `ranking.py`.
"""
