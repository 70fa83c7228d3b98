"""Quantization: recipes as data, codes and their bytes, graphs rewritten to use them, packages given a variant more.

recipe    which format each weight gets            rtn      codes by rounding to nearest
rewrite   float graph -> graph of a recipe         pack     codes as the kernels read them
store     graph and weights to disk, streaming     apply    all of it on a package, in place and atomically
"""

__all__: list[str] = []
