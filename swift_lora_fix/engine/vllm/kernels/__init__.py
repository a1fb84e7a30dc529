"""What runs on the device: the fold kernel, and CUDA graphs."""
