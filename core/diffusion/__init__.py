"""How does noise become a latent?"""
