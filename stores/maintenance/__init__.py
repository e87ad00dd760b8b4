"""Verifying, repairing, migrating and compacting stores.

May import: everything in `stores`. Start reading in `verify.py`.
"""
