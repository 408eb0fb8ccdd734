"""Models from published folders, and the examples that they are trained on."""
