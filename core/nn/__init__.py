"""What are the networks of text and image, and which layers, weight files and devices do all networks share?"""
