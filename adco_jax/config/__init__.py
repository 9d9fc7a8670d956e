"""What a run is asked: config files, the command line, ranges of keys, and the plan that follows from them."""
