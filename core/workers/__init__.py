"""Who generates on other machines, and how do their images come back?"""
