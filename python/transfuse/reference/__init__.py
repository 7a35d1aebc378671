"""The oracle of every op: plain PyTorch, float64 inside, one rounding at the end."""
