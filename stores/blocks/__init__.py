"""Runs of rows that are written once, checked by sha256, marked in the ledger and read back.

May import: `format`, `storage` and the root's basics. Start reading in `blocks.py`.
"""
