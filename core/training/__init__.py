"""How is data prepared, and how does a training run stay exact?"""
