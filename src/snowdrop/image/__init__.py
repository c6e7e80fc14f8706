"""Images: OCI images become trees in the content store."""
