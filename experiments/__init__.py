"""Each published result as one small folder: a config and calls of the packages, nothing redefined."""
