"""Folders of mlx-lm. `adapters` has save_mlx and load_mlx; `read` and `write` take adapters by torch's modules."""
