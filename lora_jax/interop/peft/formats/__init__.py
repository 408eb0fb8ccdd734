"""The files of each kind of adapter in HF PEFT, one kind a module: lora, dora, adalora, loha, lokr, vera, ia3.

Some kinds are a LoRA in another form and are read as that, by `read_as_lora`: miss, gralora, delora, bdlora, kasa. Why
the others are not read is in `refused`.

Start with `format`, the base class, which says all that a kind can differ in. `registry.FORMATS` is the one table of
the kinds: a further kind is a subclass of `Format` and an entry there. `ranks` helps to write ranks and alphas.

Modules here import `adapters`, `interop.key_map`, and of `interop.peft` only `dtypes`, `options` and `parameters`.
"""
