"""The component index: which parts of a model can be ablated, how they are named, found and selected.

May import: `models` and the root's basics. Start reading in `components.py`; a new kind goes into `kinds.py`.
"""
