"""What import and export of PyTorch networks are made of; `ibjax.convert` is their command line.

sizes, fit      which of our networks a file's names and shapes are
state_dicts     which network of a file is meant, and how it normalises
published       digests of published files
twins           the definitions in ibjax.torch_models with a network's options and weights
gate            images, and the logits of both networks on them
imports, exports
"""
