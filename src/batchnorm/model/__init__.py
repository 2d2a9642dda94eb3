"""Any torch.nn.Module that has batch norms: found, read, run on a batch, and its layers swapped in place and back."""
