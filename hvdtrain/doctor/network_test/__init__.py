"""What joins several hosts, measured by a worker on each: CPU, every link in both directions, all-reduces over pairs.

hvdtrain doctor -H a:8,b:8
    examine.py              asks the hosts for their facts first
    measure.py              decides what is measured, in which order, and again if it is far from the others
        coordinator.py      starts the workers through `hvdtrain doctor --meet`, sends commands, collects replies
            signed_lines.py     one signed line of JSON to a message (messages.py)
        worker.py           carries out each command
            links.py            measures by sockets of its own: over a broken link, Horovod would only hang
    diagnose.py             finds the host or link that is far from the others
"""
