"""The edit itself: a selection, an operation, a strength; applied, added, written and read.

May import: the root's basics. Start reading in `edit.py`; operations are in `operations.py`.
"""
