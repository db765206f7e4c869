"""How do models that other people trained draw here? Recognised, loaded and stepped behind the engine's contract."""
