"""Pictures and captions: the toy world, files, Listings 1 and 2, the order of a run (2.3, C)."""
