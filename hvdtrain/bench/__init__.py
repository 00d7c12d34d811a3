"""Measure the network, the step and gradient compression."""
