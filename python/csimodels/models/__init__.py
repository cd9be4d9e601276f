"""Models, one self-contained file each."""
