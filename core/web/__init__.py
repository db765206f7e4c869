"""What may a client ask, and what does it get? No torch."""
