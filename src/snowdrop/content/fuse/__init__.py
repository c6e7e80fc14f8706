"""A model as a directory in which every file is there: the kernel's FUSE protocol, spoken over /dev/fuse."""
