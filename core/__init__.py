"""The how: shared rooms that the root files build on and that never import the root."""
