"""The Triton kernels, a file each, and the launchers that `segkern.ops` registers for CUDA.

A launcher's file has the name of its op: mask_bits, masked_attn (its kernels are in attn_*),
masked_attn_backward, matching_cost (matching_*), neighborhood_attn (neighborhood_*), point_sample,
segment_map (segment_*) and window_attn (window_*). sigmoid and philox are functions for kernels,
_launch is what launchers ask of a device.

Imported at the first launch only: whoever stays on the CPU needs no Triton.
"""
