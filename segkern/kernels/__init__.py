"""The Triton kernels, a file an op, with the launchers that `segkern.ops` registers for CUDA.

Imported at the first launch only: whoever stays on the CPU needs no Triton.
"""
