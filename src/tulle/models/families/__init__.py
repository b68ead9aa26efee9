"""One file per model type: ``describe(config)`` turns its ``config.json`` into a ``Decoder``.

A file's name is the ``model_type``. Parts that several families share are in ``_parts``.
"""
