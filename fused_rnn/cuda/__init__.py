"""The CUDA loops of csrc/cuda from Python: the compiled module, plans for a layer, launches by address."""
