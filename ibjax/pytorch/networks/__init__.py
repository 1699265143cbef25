"""The published networks in PyTorch, with the parameter names of their authors' checkpoints.

One file each, which needs PyTorch alone: `ibjax.convert` compares logits with them, and writes them beside the weights
that it exports. They know nothing of ibjax; only their options have the names of ours. `mean` and `std` normalise each
channel and are kept with the weights.
"""
