"""How do bytes become pixels, and pixels bytes? numpy and Pillow; no network here."""
