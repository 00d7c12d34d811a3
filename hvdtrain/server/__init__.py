"""A parameter server: hand out items of an epoch and the weights, and apply each item's gradient exactly once."""
