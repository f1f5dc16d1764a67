"""Kernels of block-sparse linear layers and convolutions.

index_lists   which blocks are active, as compressed rows and columns of fixed capacity
reference     what the layers compute, in plain PyTorch: the specification
window        how a convolution moves over its input
cpu_linear    forward, input gradient and weight gradient on the CPU
cpu_conv      the same of a convolution
cpu_product   runs the generated C++ for both
cpp_rows      generates it: forward and input gradient
cpp_wgrad     generates it: weight gradient
cpp_window    what both share: where the rows of a product find their inputs
cpp_averages  generates the C++ of heads that need no weights
cpp_vectors   what both begin with: vector types, bfloat16, activations
isa           instruction sets, and how a kernel fills their registers
attention     attention by the kinds of its heads, on the CPU
cpu_averages  what it runs for those without weights
build         compiles C++, and keeps the result on disk
dense_linear  the same by the framework's dense products, for densities at which those are faster
triton_linear forward, input gradient and weight gradient on an NVIDIA GPU
triton_rows   generates their Triton: forward and input gradient
triton_wgrad  generates their Triton: weight gradient (triton_wgrad_text: its pieces)
triton_tune   chooses their tiles by the clock, and finds the density from which on the dense product is faster
triton_launch runs one of them in a given tile
triton_device what a tile must fit: the limits and rates of a GPU
triton_build  loads generated Triton, and keeps it on disk

Everything here imports torch and nothing else of this project.
"""
