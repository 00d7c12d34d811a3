"""Which rank the others wait for, and which replica has drifted."""
