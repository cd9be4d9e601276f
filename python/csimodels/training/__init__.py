"""Pre-training, adaptation, checkpoints."""
