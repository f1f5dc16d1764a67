"""Kernels of the block-sparse linear layer.

index_lists   which blocks are active, as compressed rows and columns of fixed capacity
reference     what the layer computes, in plain PyTorch: the specification
cpu_linear    forward, input gradient and weight gradient on the CPU

Everything here imports torch and nothing else of this project.
"""
