"""Where images lie: trees, shards, arrays, TFDS; which split, which classes, and one listing kept between starts."""
