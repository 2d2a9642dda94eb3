"""What PyTorch's dispatcher and autograd see: the steps of batch normalization and their derivatives."""
