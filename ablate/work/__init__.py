"""Long work on a store, block by block: the loop, its progress, logs and status.

May import: `engine`, `data` and the root's basics. Start reading in `loop.py`. What is shown of progress is in
`progress.py`; `../engine/ticks.py` counts it.
"""
