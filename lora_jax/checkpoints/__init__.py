"""Adapters and training runs on disk, with orbax.

- `manager`: `Checkpoints`, the checkpoints of a training run that may end at any moment. Start reading here.
- `state_codec`: a training state as arrays and a description, and back.
- `retention`: which checkpoints stay. `orbax_manager`: how orbax writes, reads and removes them.
- `preemption`: whether the process was told to end.
- `adapters`: adapters alone. `runs`: those of a run. Both are the public module `lora_jax.checkpoint`.
- `arrays`: a folder of arrays and a description.
- `atomic_dir`: folders that are written as a whole or not at all. `replaceable`: what they may take the place of.
- `reading`: a folder as one save left it. `failures`: what went wrong with files, and what to do about it.
- `run_lock`: whether a folder of checkpoints belongs to a run that is alive.
- `fingerprint`: whether arrays are the same as when they were saved.

May import `core` and `adapters`.
"""
