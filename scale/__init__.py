"""Many GPUs and 16 bits (2.4, 2.5, D, E), and what is quicker than the readable form."""
