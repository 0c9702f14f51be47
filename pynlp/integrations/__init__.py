"""Other libraries' names and models on pynlp's kernels.

`transformers` and `bitsandbytes` need the library that they are named after.
"""
