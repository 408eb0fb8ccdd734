"""Adapters of image models: files of sd-scripts, LyCORIS, diffusers and ComfyUI.

adapters                 load_image, save_kohya, save_diffusers, inspect_image: start here
names, spellings, joined modules: how files call them, and which are one in a file and several in a model
forms, tensors           arrays: how files shape them
metadata                 what the header says beside
reader, writers          adapters by torch's modules
"""
