"""What every part of the pack does in one way: atomic writes, caches, file states. The standard library alone."""
