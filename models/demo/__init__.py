"""The demo model that ships with the package, and the code that made it.

The folder is at once a diffusers model folder (`model_index.json` and its parts, `demo.json` with
the defaults) and a package: `clips` draws captioned clips, `judge` scores videos, `train` trains.
Nothing is imported here: generating with the demo model needs none of it.
"""
