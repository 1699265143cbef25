"""What import and export of PyTorch networks are made of; `ibjax.convert` is their command line.

imports, exports  a file becomes a run, a run becomes files
published         digests of published files
state_dicts       which network of a file is meant
normalisation     with which mean and std it normalises
sizes, fit        its depth and width, and whether it is exactly the architecture that it should be
twins             the definitions in ibjax.pytorch.networks with a network's options and weights
gate              images, and the logits of both networks on them
folders           that are made whole or not at all
"""
