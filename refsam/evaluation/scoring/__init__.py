"""Score masks that lie on the disk, by any model."""
