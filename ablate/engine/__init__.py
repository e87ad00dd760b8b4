"""The engine: outputs and gate gradients of thousands of keep-vectors over a data set, exact and within memory.

May import: `gating`, `index`, `models`, `data` and the root's basics. Start reading in `engine.py`; `gated_model.py` is
one model under gates, `loops.py` goes through rows and batches.
"""
