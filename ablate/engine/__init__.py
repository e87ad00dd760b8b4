"""The engine: outputs and gate gradients of thousands of keep-vectors over a data set, exact and within memory.

May import: `gating` and what is below it. Start reading in `engine.py`; `gated_model.py` is one model under gates,
`loops.py` goes through rows and batches.
"""
