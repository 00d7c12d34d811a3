"""What is wrong with hosts, and between them."""
