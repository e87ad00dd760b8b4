"""Models as objects: copies that respond like the original, memory that weights share, and what code a model is.

May import: the root's basics. Start reading in `copies.py`.
"""
