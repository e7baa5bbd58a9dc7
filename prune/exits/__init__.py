"""Exits on a frozen model (Balcony): train them, write one as a model of k + 1 layers."""
