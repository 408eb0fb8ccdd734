"""Other libraries' names and files.

    key_map             which tensor of a torch model each parameter is: start here
    architectures       key maps of published models; public as `lora_jax.key_maps`
    safetensors_index   where the tensors of a published model are in its files
    peft/               folders of HF PEFT, read and written
    module_adapters     what files of all formats hold, with peft_modules (folders of PEFT by it)
    image               adapters of image models: image_names, image_spellings and image_joined (modules), image_forms
                        and image_tensors (arrays), image_metadata, image_reader and image_writers
    merge_checkpoint    adapters merged into the files of a published model, without building it, with
                        tensor_changes (what becomes of each tensor), tied_files (one tensor for both ends) and
                        file_parts (the bytes that are read and written)

Modules here import `core`, `adapters`, `checkpoints`, `initialization` and one another. `merge_checkpoint` and
what it calls import `peft`; the others know nothing of it.
"""
