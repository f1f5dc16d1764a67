"""Kernels of block-sparse linear layers and convolutions.

index_lists       which blocks are active, as compressed rows and columns of fixed capacity
reference         what the layers compute, in plain PyTorch: the specification
window            how a convolution moves over its input
verbs             a call of forward, dgrad or wgrad, as its arguments

cpu_linear        forward, input gradient and weight gradient on the CPU
cpu_conv          the same of a convolution
cpu_product       runs the generated C++ for both
cpp_rows          generates it: forward and input gradient
cpp_rows_packing  generates what it packs: listed blocks of the weight, inputs of a tile of rows
cpp_wgrad         generates it: weight gradient
cpp_wgrad_packing generates what it packs: both inputs, by blocks
cpp_window        what both share: where the rows of a product find their inputs
cpp_vectors       what both begin with: vector types, bfloat16, activations
cpp_factors       what they multiply: float32, or pairs of bfloat16
isa               instruction sets, and how a kernel fills their registers
cpu_signals       what of a dense gradient is the gate's, and its signals
cpp_signals       generates the C++ of that
attention         attention by the kinds of its heads, on the CPU
cpu_averages      what it runs for those without weights
cpp_averages      generates the C++ of these
build             compiles C++, and keeps the result on disk

dense_linear      the verbs of cpu_linear by the framework's dense products, for densities at which those are faster
dense_conv        the same of a convolution
compact           either, of the rows and columns that have an active block

triton_linear     forward, input gradient and weight gradient on an NVIDIA GPU
triton_conv       the same of a convolution
triton_rows       generates their Triton: forward and input gradient (triton_rows_text: its text)
triton_wgrad      generates their Triton: weight gradient (triton_wgrad_text: its text)
triton_window     what a convolution adds to both: where taps lie in the input
triton_tune       chooses tiles by the clock (triton_clock), and the density from which the dense product is faster
triton_launch     runs a kernel in a given tile
triton_device     what a tile must fit: the limits and rates of a GPU
triton_build      loads generated Triton, and keeps it on disk

Everything here imports torch and nothing else of this project.
"""
