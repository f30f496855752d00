"""Losses: tensors in, scalars out; no files, no torch.distributed."""
