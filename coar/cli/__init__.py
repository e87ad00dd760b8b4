"""The command line `coar`: one file per command or group of commands.

May import: everything, when a command runs. Start reading in `app.py`, where a new command gets its line; `common.py`
has what commands share.
"""
