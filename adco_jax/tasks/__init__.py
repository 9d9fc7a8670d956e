"""What main can be asked to do, one module each, and what several of them share."""
