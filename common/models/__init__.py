"""Parts of networks that several tasks build theirs from."""
