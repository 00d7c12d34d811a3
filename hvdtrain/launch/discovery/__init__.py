"""Which hosts an elastic run may use now."""
