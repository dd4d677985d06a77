"""The paper: arrays and callables, no file, no mesh, no network by its name."""
