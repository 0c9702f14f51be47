"""Other libraries' models on pynlp's kernels; each module here needs the library it is named after."""
