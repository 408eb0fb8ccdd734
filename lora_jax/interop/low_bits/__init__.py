"""Weights of 4 or 8 bits as other libraries publish them, read as numbers.

Start with `codes`: the numbers that bytes stand for. `config` reads which way of packing a folder has, `files` which
tensors belong to one weight.
"""
