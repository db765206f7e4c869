"""Which layers, weight files and devices do the networks share?"""
