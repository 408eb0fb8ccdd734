"""`lora_apply`, `plan` and `merge`: a function as a jaxpr, and what becomes of its weights. Imports core alone.

    apply            `lora_apply`, the one idea of the library: start here
    tracing          a function of parameters to a jaxpr, once for each set of shapes
    interpreter      the loop over the equations of a jaxpr, some of whose values are adapted weights
    adapted_weight   a frozen array and the operand of its adapter, in the place of W'
    control_flow     scan, while, cond, remat, jit and shard_map, built again around such a weight
    primitives/      what each other operation does to one
    materialize      where a program cannot use a weight in factored form
    plan, probe      which weights get an adapter, found by following each through the program
    rule_checks      whether the rules of a plan are rules
    merge            W' as an array, which is the definition of all this

No module here knows a kind of adapter, a format of packed weights, or a mesh.
"""
