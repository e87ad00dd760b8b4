"""What is where in a store: the root's metadata, groups, columns, chunks and shards.

May import: `storage` and the root's basics. Start reading in `groups.py`. A new field is made in `create` of
`../attributions.py` or `../campaign.py`; what a root must hold is checked in `root.py`.
"""
