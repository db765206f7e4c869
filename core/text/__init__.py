"""What does an English sentence say about forty attributes of a face? The standard library alone."""
