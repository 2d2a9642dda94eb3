"""Timing batch normalization on this machine beside torch's: `batchnorm bench`."""
