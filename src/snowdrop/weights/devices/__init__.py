"""Where tensors end up: the CPU's memory, a CUDA device, or whatever else torch can copy to."""
