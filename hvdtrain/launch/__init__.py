"""Starting ranks on hosts, and what comes of them."""
