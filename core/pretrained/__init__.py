"""How do models that other people trained generate here? Recognised, loaded and stepped behind the engine's
contract."""
