"""How good are the pictures, and how fast do they come?"""
