"""The published networks in PyTorch, with the parameter names of their authors' checkpoints.

Each network is one file that needs only PyTorch: `ibjax.convert` compares logits with it, and writes it beside exported
weights. The files do not import ibjax, but their options have the names of our models' options. `mean` and `std`
normalise each channel and are stored with the weights.
"""
