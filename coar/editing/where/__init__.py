"""Where to edit: layers, blocks and scopes of a model, and what methods take if nobody says.

May import: `edits`. Start reading in `layers.py`.
"""
