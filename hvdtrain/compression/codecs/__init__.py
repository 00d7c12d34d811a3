"""The compressors: each file registers one, or a few that share their code.

Helpers belong to `hvdtrain.compression`: every module here is imported to find components.
"""
