"""An image as a directory at once: EROFS over lazily served data, FUSE, or an eager unpack."""
