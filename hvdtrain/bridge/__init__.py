"""Recipes of other frameworks on the torch trainer: arrays as torch parameters, functions as a torch model."""
