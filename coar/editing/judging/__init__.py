"""What an edit did: reports, predictions kept, benchmark sets, the search for a layer.

May import: `edits`, `metrics`. Start reading in `evaluate.py`.
"""
