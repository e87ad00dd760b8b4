"""What an edit did: reports, predictions kept, benchmark sets, the search for a layer.

May import: `edits`, `where`, `metrics`, files beside it and the root's basics. Start reading in `evaluate.py`.
"""
