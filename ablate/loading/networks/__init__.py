"""Networks by source: packages, checkpoints, files that ship trained weights. Each is imported when it is used.

May import: the files beside it in `loading`. Start reading in `by_name.py`.
"""
