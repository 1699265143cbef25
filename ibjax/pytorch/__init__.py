"""Import and export of PyTorch networks; `ibjax.convert` is the command line.

| module           | task                                                                                            |
|------------------|-------------------------------------------------------------------------------------------------|
| imports, exports | turn a PyTorch file into a run, and a run into PyTorch files                                    |
| published        | the table of published networks, and digests of their files                                     |
| zoo, verified    | read the files of published networks by name; those on MNIST that have been verified            |
| state_dicts      | finds the requested network in a file                                                           |
| normalisation    | decides the mean and std with which the network normalises pixels                               |
| sizes, fit       | read depth and width from the file; check that it matches the architecture exactly              |
| twins            | builds the definitions in ibjax.pytorch.networks with a network's options and weights           |
| gate             | compares the logits of both networks on the same images                                         |
| folders          | writes a folder completely or not at all                                                        |
"""

import typing

from ibjax import lazy

if typing.TYPE_CHECKING:
    from ibjax.pytorch import architectures, exports, imports, published, zoo

__all__ = [
    "architectures",
    "exports",
    "imports",
    "published",
    "zoo",
]
__getattr__, __dir__ = lazy.attach(__name__, __all__)
