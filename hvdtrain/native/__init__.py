"""Building, finding and checking Horovod: plan -> build -> install, and what is installed.

    make.py       what `hvdtrain horovod build` does, by the shortest way
    plan.py       what to build on this machine and why (torchinfo, mpi, cuda)
    build.py      the wheel of a plan (source, patches, log), and its installation
    cache.py      where wheels are kept
    record.py     what a wheel was built from, stored inside it
    installed.py  which Horovod is installed, and whether it fits the installed torch
    check.py      what `hvdtrain horovod check` does (with hvdtrain.comm.probe)

Nothing here imports Horovod or torch: `hvdtrain --help` must stay fast.
"""
