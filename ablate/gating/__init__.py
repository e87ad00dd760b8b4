"""Gates on components, by weights and by activations, and the proof that both do what zeroing by hand does.

May import: `index`, `models`, `data` and the root's basics. Start reading in `literal.py`, the definition, then in
`weights.py` and `activation.py`; `probe.py` finds out how a model uses its layers.
"""
