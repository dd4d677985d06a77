"""The embedded world: a small set of real pictures, its networks and the demonstration."""
