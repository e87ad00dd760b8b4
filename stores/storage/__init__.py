"""Bytes at a place: objects written whole, retries, addresses, drafts that become stores at once.

May import: the root's basics. Start reading in `objects.py`.
"""
