"""Editing methods, one per file; each is an `Editor` and one line in `registry.py`.

May import: everything in `editing` but `registry`. Start reading in `finetune.py`; copy
`interpolation.py` for a new one.
"""
