"""What kernels take beside their outputs, by device. Rules come from the sources that each names."""
