"""Data sets by source: arrays, folders of images, text files. Each is imported when it is used.

May import: `data`, and the files beside it in `loading`. Start reading in `arrays.py`.
"""
