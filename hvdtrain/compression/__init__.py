"""Gradient compression: codecs as pure functions on flat tensors, and the channels that carry them over ranks.

Knows torch tensors and `hvdtrain.collectives`, and no optimizer: other frameworks hand their gradients over by DLPack.
"""
