"""`coar edit` and `coar edit-info`.

May import: `cli` beside it, and everything below. Start reading in `command.py`.
"""
