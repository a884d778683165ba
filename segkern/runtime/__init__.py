"""How work runs: CUDA graphs, kept constants, devices, Ctrl-C."""
