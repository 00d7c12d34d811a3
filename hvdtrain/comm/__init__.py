"""The only room that talks to Horovod."""
