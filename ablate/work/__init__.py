"""Long work on a store, block by block: the loop, its progress, logs and status.

May import: `stores` and the root's basics. Start reading in `loop.py`.
"""
