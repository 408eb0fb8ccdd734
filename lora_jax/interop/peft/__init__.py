"""Folders of HF PEFT: `adapter_config.json` beside `adapter_model.safetensors`, read and written.

Start with `load`, whose `load_peft` calls these in turn:

    config, options     1. the config: its format and its options; config_keys of those that no format knows
    files, tensor_names 2. the tensors of the file, by the names that PEFT gives them
    contents            3. modules: which tensors belong together, and what stands beside them
    (key_map.KeyMap)    4. matches: the parameters that these are, with module_prefixes where names begin otherwise
    from_modules        5. adapters of the modules; biases, token_rows, full_weights: of what stands beside them
    residual_bases         and the bases of adapters that began as a part of the weights
    tied_tables            and what is of one end of a table that is the head as well

and go on with `save`, the way back: to_modules and module_parts (profiles for other readers), then the tensors and the
config, then the folder. parameters, adapter_axes, experts and dtypes are small helpers of both. target_parameters and
experts_apart tell, by a model's own files, what a folder of adapters of experts is of.

What differs from one kind of adapter to the next is in `formats`, and only there.
"""
