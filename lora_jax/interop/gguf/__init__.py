"""GGUF, the files of llama.cpp: adapters beside a model, and whole merged models.

adapters        save_gguf and load_gguf: start here
base, names     what has to be known of the model, and what its weights are called there
file            the container, read and written
factors         A and B in the order that llama.cpp has them in
read, write     adapters by torch's modules
merged          merge_gguf: a model with its adapters in its weights, with merged_keys (what the file says of it)
"""
