"""Examples: inputs and targets, checked, hashed and numbered; whatever users bring becomes one of them.

May import: the root's basics (errors, state, logits). Start reading in `examples.py`.
"""
