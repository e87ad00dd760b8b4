"""Editing methods, an `Editor` each, and what several of them need; masks and COAR-Edit have rooms of their own.

May import: everything in `editing` below it, not `masks`, `coar_edit` or `registry.py`. Start reading in
`output_collision.py`, and copy it for a new method, which gets a line in `../registry.py`.
"""
