"""Which route answers what? One module a group of routes."""
