"""Channels: rays to CSI, generators, files."""
