"""clipgraft: train a CLIP cheaply, grow experts from it, graft them into one CLIP-MoE."""

__version__ = "0.1.0"
