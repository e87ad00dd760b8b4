"""`python -m coar`: the command line, with the Python that runs it."""

from __future__ import annotations

from coar.cli.app import main

if __name__ == "__main__":
    main()
