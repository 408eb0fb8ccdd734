"""What the site has beside Sphinx's own extensions: pages of names, of files and of commands.

- `names`: the public names of the package.
- `docstrings`: docstrings, with `plain_text`, which makes reStructuredText of their text.
- `api`: the directive for pages of the reference, and links to public names.
- `files`: pages of files outside docs/ that pages link to, such as examples.
- `commands`: the directive for the help of a command.
"""
