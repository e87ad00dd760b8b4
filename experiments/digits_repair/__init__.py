"""COAR-Edit repairs a digit classifier that looks at the background: the demo's job over several seeds."""
