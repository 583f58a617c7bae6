"""The version of dwf and the name it is installed under, in a module that imports nothing of it."""

__version__ = "0.1.0"
# On the public index `dwf` and `moe-kernels` are other people's packages.
DISTRIBUTION = "divided-we-fall"
