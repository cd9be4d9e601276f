"""Plain PyTorch implementations: the oracle of every kernel, and the fallback without a compiler."""
