"""Gradient compression: codecs on flat tensors, and the reducers that sum a flat tensor over ranks by them.

    codec.py       what a codec is           registry.py, arguments.py   how one is added: a file in codecs/
    codecs/        the codecs                spec.py, options.py         --compression
    reducer.py     encode, collectives, decode, error feedback           cost_model.py   what that costs

Knows torch tensors and `hvdtrain.comm.collectives`, and no optimizer: any framework can hand its gradients over by
DLPack.
"""
