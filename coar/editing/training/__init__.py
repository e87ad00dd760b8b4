"""What editing methods that train have in common: descent, early stopping, logs, settings.

May import: `where`, `edits`, `judging` beside it. Start reading in `descent.py`.
"""
