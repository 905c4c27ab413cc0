"""Every claim of the method, verified exactly on worlds small enough to enumerate. Start at README.md."""
