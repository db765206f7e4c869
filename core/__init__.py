"""How is it all done? Packages that the root files build on and that never import the root."""
