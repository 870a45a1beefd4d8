"""The networks of the small models in plain torch, under the names that diffusers and transformers keep their weights.

They compute what those libraries do, bit for bit, without importing them: that takes 6 s of a core and 150 MB of memory
that no two processes share, of which a device that holds a small model makes no use.
"""
