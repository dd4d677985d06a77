"""The networks. Nothing here knows about training."""
