"""Edits: a selection of components, an operation on it and a strength; methods that find them, reports that judge them.

May import: `attributions`, `estimators`, `judging`, `metrics` and the root's basics. Start reading in `edits/edit.py`,
then in `abstract.py`; a new method goes into `methods/` and gets a line in `registry.py`.
"""
