"""Batch-normalization layers: drop-in subclasses of torch.nn's."""
