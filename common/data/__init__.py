"""Where samples are, in which order they come, how they are decoded and augmented."""
