"""Packed models: a whole checkpoint, weights coded without loss, in one checked .safetensors file.

docs/packed.md describes the format so that it can be read without this code.
"""
