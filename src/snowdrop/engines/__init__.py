"""Services that `snowdrop run` deploys. Each folder is packed as the code of a revision, like a user's own."""
