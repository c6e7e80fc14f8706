"""The content path: cutting trees into verified chunks and packs, and bringing them back to a node."""
