"""Which editing method for which task: all registered methods on three tasks made of handwritten digits."""
