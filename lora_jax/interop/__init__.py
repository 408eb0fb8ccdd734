"""Other libraries' names and files.

    key_map             which tensor of a torch model each parameter is: start here
    architectures       key maps of published models; public as `lora_jax.key_maps`
    safetensors_index   where the tensors of a published model are in its files
    peft/               folders of HF PEFT, read and written
    module_adapters     what adapters' files of all formats hold: start here for a further one
    peft_modules        folders of PEFT by it; safetensors_writer writes these files one tensor at a time
    gguf/, mlx/, image/ files of llama.cpp, of mlx-lm, and of sd-scripts, LyCORIS, ComfyUI and diffusers
    torchtune           adapters by torchtune's names
    conversions         the table of all these, for `lora-jax convert`
    qwix_trees          adapters in the trees of qwix, tunix and MaxText
    keras_lora          the `.lora.h5` files of keras-hub
    low_bits/           models published in 4 and 8 bits, read as the numbers that they stand for
    merge_checkpoint    adapters merged into the files of a published model, without building it, with
                        tensor_changes (what becomes of each tensor), tied_files (one tensor for both ends) and
                        file_parts (the bytes that are read and written), merge_work and merge_rows
    merge_quantized     the same into fp8 or int8, with eight_bit_codes

Modules here import `core`, `adapters`, `checkpoints`, `initialization` and one another. `merge_checkpoint` and
what it calls import `peft`; the others know nothing of it.
"""
