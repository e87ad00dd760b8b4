"""What editing methods that train have in common: descent, early stopping, logs, settings.

May import: `judging`, `where`, `edits`, `metrics`, files beside it and the root's basics. Start reading in
`descent.py`.
"""
