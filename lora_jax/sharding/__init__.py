"""Where adapters, batches and gradients are on a mesh.

Start with `adapters`: the partition specs of adapters, from those of the weights. `batches` makes global batches of
each process's rows, `gradient_copies` reduces gradients over devices once a step, and `devices` says where arrays are.

May import core and transform.
"""
