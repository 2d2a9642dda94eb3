"""Batch norms between PyTorch, Keras and Flax.

port          the public face: batchnorm.port
keras         from Keras's layers and to them
keras_config  what the config of such a layer means
keras_file    such layers in Keras's files, read without Keras
keras_rank    how many dimensions their inputs have
renorm        Keras's batch renormalization
flax          from Flax's variables and to them
values        what a layer of any library has, and a layer of ours made of it
parity        a layer compared with its original
"""

from . import port

__all__ = ["port"]
