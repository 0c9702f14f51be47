"""Other libraries' names and models on pynlp's kernels. Only `transformers` needs the library it is named after."""
