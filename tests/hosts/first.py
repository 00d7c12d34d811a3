"""The first process of a host: what it leaves running ends with it, and it ends when nobody holds its standard input.

It gets children only from processes that lost their parent, and reaps those by ignoring SIGCHLD.
"""

import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # Ctrl-C in a terminal is for the holder.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while os.read(0, 1024):
        pass
