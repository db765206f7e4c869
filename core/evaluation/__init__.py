"""How good are the images, and how fast do they come?"""
